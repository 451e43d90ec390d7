"""`sae attribute`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import sae
from sae.cli.attribute import attribute as attribute_command
from sae.effects import Attribution, NextToken
from sae.effects.attribution import METHODS
from sae.errors import ConfigError, FormatError
from tests.support.calling import call

TEXT = "The river keeps a stone"


def test_the_table_and_the_file_are_those_of_python(finished: Path, tmp_path: Path, tiny_model: Path) -> None:
    model, dictionary = sae.LanguageModel(str(tiny_model)), sae.load(finished)
    texts = {number: model.to_texts([number])[0] for number in range(260, 400)}
    token, minus, *_ = (
        text
        for number, text in texts.items()
        if model.tokenizer(text, add_special_tokens=False)["input_ids"] == [number]
    )
    target = ("--token", token, "--minus", minus, "--position", -2)
    options = (*target, "--steps", 3, "--groups", 2, "--top", 4, "--errors")
    result = call("attribute", finished, TEXT, *options, "--json", tmp_path / "a.json")
    expected = sae.attribute(
        dictionary, model, TEXT, of=NextToken(token, minus, -2), steps=3, groups=2, error_term=True
    )  # fmt: skip
    assert Attribution.load(tmp_path / "a.json").to_json() == expected.to_json()
    lines = result.output.splitlines()
    position = expected.tokens.shape[1] - 2
    assert lines[0] == f"logit of {token!r} minus that of {minus!r} after position {position}: {expected.value[0]:.4g}"
    rows = [line.split() for line in lines if line.strip()[:1].isdigit()]
    for row, entry in zip(rows, expected.top(4), strict=True):
        assert row[0] == str(entry.position) and f"{entry.attribution:+.3g}" in row
        assert ("error" if entry.feature is None else str(entry.feature)) in row
    assert "fires on" in result.output and "completeness gap" in result.output and "sae features" not in result.output
    store, first = sae.Features(finished), next(entry for entry in expected.top(4) if entry.feature is not None)
    assert first.feature is not None
    assert store[first.feature].dead or f"«{store[first.feature].peek[0]}»" in result.output


def test_other_numbers(finished: Path) -> None:
    probable = call("attribute", finished, TEXT, "--method", "gradient_activation", "--by-feature", "--top", 3)
    assert probable.output.startswith("logit of ") and "gradient × activation" in probable.output
    assert "positions" in probable.output.splitlines()[1] and "activation  " not in probable.output.splitlines()[1]
    log_p = call("attribute", finished, TEXT, "--log-probability", "--steps", 1)
    assert log_p.output.startswith("log-probability of ") and "integrated gradients, 1 steps" in log_p.output


def test_without_features_the_way_to_them_is_named(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(run / "features")
    result = call("attribute", run, TEXT, "--steps", 1)
    assert "fires on  " not in result.output
    assert result.output.splitlines()[-1].endswith(f"sae features {run}")


def test_refusals(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reads it as \d+ tokens"):
        call("attribute", finished, TEXT, "--token", "The river keeps")
    with pytest.raises(FormatError, match=r"no config\.json there; give a dictionary folder or a run folder"):
        call("attribute", tmp_path, TEXT)
    with pytest.raises(ConfigError, match="steps=3: gradient_activation has no path"):
        call("attribute", finished, TEXT, "--method", "gradient_activation", "--steps", 3)
    with pytest.raises(ConfigError, match=r"does not read dictionary\.k"):
        call("attribute", finished, TEXT, "dictionary.k=3")
    assert "'river' is not KEY=VALUE; put the text into quotes" in call("attribute", finished, "The", "river").output
    assert "is not a file name" in call("attribute", finished, TEXT, "--json", tmp_path).output
    assert json.loads((finished / "eval.json").read_text())["dictionary"]


def test_the_command_offers_every_method() -> None:
    (option,) = (one for one in attribute_command.params if one.name == "method")
    assert tuple(option.type.choices) == METHODS  # pyright: ignore[reportAttributeAccessIssue]


def test_a_dictionary_without_a_run(finished: Path, tmp_path: Path, tiny_model: Path) -> None:
    """The same numbers, with the model that is given."""
    sae.load(finished).save(tmp_path / "alone")
    options = ("--steps", 3, "--json", tmp_path / "a.json")
    call("attribute", finished, TEXT, *options)
    of_run = json.loads((tmp_path / "a.json").read_text())
    result = call("attribute", tmp_path / "alone", TEXT, "--model", tiny_model, *options)
    assert result.exit_code == 0 and json.loads((tmp_path / "a.json").read_text()) == of_run
    with pytest.raises(ConfigError, match="has a model and texts of its own, so --model has no effect"):
        call("attribute", finished, TEXT, "--model", tiny_model)
