"""`sae steer`: prompts continued with and without steering."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sae
from tests.conftest import Command, assert_refused

PROMPTS = ("the river", "a stone and a house")


def test_texts_before_and_after(run_folder: Path, tiny_model: Path, command: Command) -> None:
    """As in Python, and what a usual activation is."""
    words = ("--max-new-tokens", 5, "--random", 2)
    done = command("steer", run_folder, "5=6.5", "9=-2", *PROMPTS, *words, "--json")
    assert done.status == 0, done.err
    model, dictionary = sae.LanguageModel(tiny_model), sae.load(run_folder)
    effect = sae.measure_steering(model, dictionary, PROMPTS, {5: 6.5, 9: -2.0}, max_new_tokens=5, random_directions=2)
    assert json.loads(done.out) == json.loads(json.dumps(effect.to_json()))
    shown = command("steer", run_folder, "5=6.5", "9=-2", *PROMPTS, *words)
    assert shown.status == 0, shown.err
    for one in effect.prompts:
        assert f"Prompt: {one.prompt}" in shown.out
        assert f"{one.kl:.3g}" in shown.out
    store = sae.Features(run_folder)
    row = next(line.split() for line in shown.out.splitlines() if line.split()[:2] == ["5", "+"])
    assert row[2:5] == ["6.5", f"{store[5].mean:.3g}", f"{store[5].max:.3g}"]


@pytest.mark.parametrize(
    ("words", "steering"),
    [
        (("5=3", "--mode", "clamp"), sae.Steering({5: 3.0}, "clamp")),
        (("5", "9", "--mode", "ablate"), sae.Steering({5: 0.0, 9: 0.0}, "ablate")),
        (("5=2e1", "--positions", "generated"), sae.Steering({5: 20.0}, positions="generated")),
        (("5=20", "--positions", "2,4-6"), sae.Steering({5: 20.0}, positions=(2, 4, 5, 6))),
        (("5=20", "--token", "."), sae.Steering({5: 20.0}, tokens=(".",))),
    ],
)
def test_what_is_done_where(
    run_folder: Path, tiny_model: Path, command: Command, words: tuple[str, ...], steering: sae.Steering
) -> None:
    """With sampling."""
    done = command("steer", run_folder, *words, "the river.", "--seed", 4, "--temperature", 0.8, "--json")
    assert done.status == 0, done.err
    model, dictionary = sae.LanguageModel(tiny_model), sae.load(run_folder)
    effect = sae.measure_steering(model, dictionary, "the river.", steering, seed=4, temperature=0.8)
    assert json.loads(done.out) == json.loads(json.dumps(effect.to_json()))


def test_settings_of_the_run_are_no_prompts(run_folder: Path, command: Command) -> None:
    words = ("5=6", "a =b", "x=1", "--max-new-tokens", 2, "--random", 1, "--json")
    done = command("steer", run_folder, *words, "device=cpu", "model.trust_remote_code=false")
    assert done.status == 0, done.err
    assert [one["prompt"] for one in json.loads(done.out)["prompts"]] == ["a =b", "x=1"]
    assert done.out == command("steer", run_folder, *words).out


@pytest.mark.parametrize("columns", ["44", "160"])
def test_any_width(run_folder: Path, command: Command, columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    done = command("steer", run_folder, "5=6", "the river", "--max-new-tokens", 20)
    assert done.status == 0
    assert max(len(line) for line in done.out.splitlines()) <= int(columns)


def test_a_dictionary_without_a_store(run_folder: Path, tiny_model: Path, command: Command, tmp_path: Path) -> None:
    sae.load(run_folder).save(tmp_path / "alone")
    done = command("steer", tmp_path / "alone", "5=6", "the river", "--model", tiny_model, "--max-new-tokens", 3)
    assert done.status == 0, done.err
    assert "a feature store would know" in " ".join(done.out.split())


def test_what_cannot_be_done_is_refused(run_folder: Path, command: Command) -> None:
    for words, message in (
        (("the river",), "'the river': no feature among the arguments; give FEATURE=VALUE, such as 123=8"),
        (("5", "the river"), "'5': no feature among the arguments"),
        (("5=3",), "there is no prompt: give one or several texts after the features"),
        (("5=3", "5=4", "the river"), "'5=4': feature 5 has a value already"),
        (("5=3", "the river", "--mode", "ablate"), "'5=3': --mode ablate takes no value; give 5, or --mode clamp"),
        (("5=3", "7=nan", "the river"), "'7=nan': not a feature and a number, such as 7=8.5; if it is a prompt, put a"),
        (("5=8,5", "the river"), "'5=8,5': not a feature and a number"),
        (("5=", "the river"), "'5=': not a feature and a number"),
        (
            ("5=3", "the river", "seed=1"),
            "'seed=1': a setting that a finished run does not read; it reads model., harve",
        ),
        (("5=3", "the river", "data.tokens=9"), "If it is a text, put a space before the ="),
        (("5=3", "the river", "model.trust=true"), "model.trust"),
        (("64=3", "the river"), "feature 64: the dictionary has features 0 to 63"),
        (("5=3", "the river", "--positions", "4-2"), "--positions='4-2': expected all, prompt, generated, or numbers"),
        (
            ("5=3", "the river", "--positions", "last"),
            "--positions='last': expected all, prompt, generated, or numbers",
        ),
        (("5=3", "the river", "--token", "the river"), "token 'the river': tiny reads it as "),
        (("5=1e999", "the river"), "feature 5: inf is not a finite number"),
        (("5=3", "the river", "--max-new-tokens", 64), "tiny reads at most 64"),
    ):
        assert_refused(command("steer", run_folder, *words), message)
