"""`sae find` and `sae.find`: the three ways to show a concept, a run and a dictionary's folder, and bad input."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

import sae
from sae.errors import ConfigError, DataError, ModelError
from sae.probing import ConceptConfig
from sae.runs.run import Run
from tests.conftest import Command, assert_refused, make_tiny_config

QUICK = ConceptConfig(permutations=49, examples=80)
HOOK = "blocks.1.hook_resid_pre"
FILLER = "river stone house winter garden engine mother silver window question".split()


def texts(word: str, count: int = 40, seed: int = 0) -> list[str]:
    """Random words, with one in the middle."""
    rng = random.Random(f"{word} {seed}")
    return [
        " ".join([*rng.choices(FILLER, k=rng.randint(2, 5)), word, *rng.choices(FILLER, k=rng.randint(2, 5))])
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def made(tiny_model: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a dictionary. Read only."""
    folder = tmp_path_factory.mktemp("find") / "run"
    run = Run(make_tiny_config(tiny_model, text_folder, folder, {"dictionary.k": 8}))
    run.harvest()
    run.train()
    return run.folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def test_a_word_s_features_are_those_of_activations_read_by_hand(run: Path) -> None:
    having = texts("letter", 60)
    result = sae.find(run, word="letter", texts=having, settings=QUICK)
    assert (result.name, result.positive, result.subject["hook"]) == ("letter", "with", HOOK)
    model, dictionary = Run.open(run).language_model, sae.load(run)
    best = result.best
    for example in best.examples:
        place = example.position
        text = "".join(example.tokens)
        ids = model.to_tokens(text.removeprefix(model.to_texts([model.bos])[0]))
        values = dictionary.encode(model.activations(ids, [HOOK])[HOOK][0])[:, best.index]
        assert example.value == pytest.approx(float(values[place]), abs=1e-4), text
        if example.positive:
            assert example.tokens[place].strip() in "letter"


def test_two_sides_give_the_same_in_a_run_and_in_a_dictionary_s_folder(run: Path, tmp_path: Path) -> None:
    having, lacking = texts("letter"), texts("bright")
    first = sae.find(run, having, lacking, settings=QUICK)
    model = Run.open(run).language_model
    second = sae.find(run / "dictionary", having, lacking, model=model, settings=QUICK)
    third = sae.find(sae.load(run), having, lacking, model=model, settings=QUICK)
    assert first.features == second.features == third.features
    assert first.neuron == second.neuron
    assert first.examples == (20, 20)
    for name, content in (("a.txt", having), ("b.txt", lacking)):
        (tmp_path / name).write_text("\n".join(content))
    by_file = sae.find(run, tmp_path / "a.txt", tmp_path / "b.txt", settings=QUICK)
    assert (by_file.features, by_file.name) == (first.features, "a")


def test_the_language_model_reads_the_same_examples_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    having, lacking = texts("letter"), texts("bright")
    first = sae.find(run, having, lacking, settings=QUICK)
    monkeypatch.setattr("sae.runs.run.LanguageModel", None)
    again = sae.find(run, having, lacking, settings=QUICK)
    assert again.to_json() == first.to_json(), "texts of the examples are kept too"
    longer = sae.find(run, having, lacking, settings=QUICK.model_copy(update={"permutations": 99}))
    assert longer.features[0].search_auc == first.features[0].search_auc
    with pytest.raises(TypeError):
        sae.find(run, having, texts("bright", seed=1), settings=QUICK)


def test_latents_of_a_text_are_means_over_its_tokens(run: Path) -> None:
    having, lacking = texts("letter", 20), texts("bright", 20)
    mean = sae.find(run, having, lacking, settings=QUICK)
    last = sae.find(run, having, lacking, settings=QUICK.model_copy(update={"pool": "last"}))
    assert all(sum(value != 0 for value in shown.activations) <= 1 for shown in last.best.examples)
    for shown in mean.best.examples:
        tokens = len(shown.tokens) - 1  # without BOS
        assert shown.value == pytest.approx(sum(shown.activations) / tokens, rel=1e-4)


def test_a_labelled_file(run: Path, tmp_path: Path) -> None:
    rows = [f"{text},{label}" for label in ("letter", "bright", "often") for text in texts(label, 30)]
    (tmp_path / "labelled.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    with pytest.raises(DataError, match="several labels; set positive=LABEL to one of: 'bright', 'letter', 'often'"):
        sae.find(run, data=tmp_path / "labelled.csv", settings=QUICK)
    settings = QUICK.model_copy(update={"positive": "often"})
    result = sae.find(run, data=tmp_path / "labelled.csv", settings=settings)
    assert (result.positive, result.name) == ("often", "labelled")
    spans = [json.dumps({"text": text, "spans": [[0, text.index(" "), "first"]]}) for text in texts("letter")]
    (tmp_path / "spans.jsonl").write_text("\n".join(spans) + "\n")
    settings = QUICK.model_copy(update={"outside": "later", "positive": "first"})
    assert sae.find(run, data=tmp_path / "spans.jsonl", settings=settings).positive == "first"


def test_what_is_not_one_concept_is_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="no concept: give texts with and without the concept"):
        sae.find(run)
    with pytest.raises(ConfigError, match="several concepts: give"):
        sae.find(run, ["a"], ["b"], word="a", texts=["a"])
    with pytest.raises(ConfigError, match="no texts without the concept: give"):
        sae.find(run, ["a"])
    with pytest.raises(ConfigError, match="a word needs texts, and texts need a word: give"):
        sae.find(run, word="a")
    with pytest.raises(DataError, match="data 'texts': 1 example of 'without', at least 12 are needed; add some"):
        sae.find(run, texts("letter"), ["one text"], settings=QUICK)


def test_a_dictionary_needs_its_own_model(run: Path, tmp_path: Path) -> None:
    having, lacking = texts("letter"), texts("bright")
    with pytest.raises(
        ConfigError, match=r"not a run folder, and needs its language model: --model NAME; it was train"
    ):
        sae.find(run / "dictionary", having, lacking)
    with pytest.raises(ModelError, match="not the dictionary's model"):
        sae.find(run / "dictionary", having, lacking, model="demo")
    plain = sae.TopK(32, 64, k=4)
    plain.save(tmp_path / "plain")
    with pytest.raises(ConfigError, match="does not record the hook point that it reads; in Python"):
        sae.find(tmp_path / "plain", having, lacking, model="demo")


def test_the_command(run: Path, tmp_path: Path, command: Command) -> None:
    for name, word in (("a.txt", "letter"), ("b.txt", "bright")):
        (tmp_path / name).write_text("\n".join(texts(word)))
    sides = ["--with", str(tmp_path / "a.txt"), "--without", str(tmp_path / "b.txt")]
    files = ["--json", str(tmp_path / "found.json"), "--page", str(tmp_path / "found.html")]
    done = command("find", str(run), *sides, *files, "permutations=49", "examples=80")
    assert done.status == 0, done.err
    record = json.loads((tmp_path / "found.json").read_text())
    best = record["features"][0]
    assert f"feature {best['index']}" in done.out and "features, shuffled" in done.out
    assert record["settings"]["permutations"] == 49
    result = sae.find(run, tmp_path / "a.txt", tmp_path / "b.txt", settings=QUICK)
    assert json.loads(json.dumps(result.to_json())) == record
    assert f"Feature {best['index']} on held-out examples" in (tmp_path / "found.html").read_text()
    assert not (tmp_path / "SHA256SUMS").exists()
    again = command("find", str(run), "--word", "letter", "--texts", str(tmp_path / "a.txt"), "permutations=49")
    assert again.status == 0 and "'letter'" in again.out


def test_the_command_refuses_in_one_line(run: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "a.txt").write_text("\n".join(texts("letter")))
    file = str(tmp_path / "a.txt")
    assert_refused(command("find", str(run)), "no concept", "--with FILE --without FILE")
    assert_refused(command("find", str(run), "--with", file, "--without", file), "with and without the concept")
    assert_refused(command("find", str(run), "--word", "cat", "--texts", file), "word 'cat': in none of 40 texts")
    assert_refused(
        command("find", str(run), "--word", "a", "--texts", file, "shuffles=3"), "unknown setting 'shuffles'"
    )
    assert_refused(command("find", str(run), "--with", file, "--without", str(tmp_path / "no")), "cannot be read")
    usage = command("find", str(run / "dictionary"), "--word", "a", "--texts", file, "device=cpu")
    assert usage.status == 2 and "only a run folder has settings" in usage.err


def test_searches_in_the_terminal(run: Path, command: Command) -> None:
    (run / "labels.csv").write_text("feature,label\n3,about winter\n")
    listed = command("features", str(run), "--search", "e")
    assert listed.status == 0 and " fires on '" in listed.out and " of 64" in listed.out
    assert "label 'about winter'" in command("features", str(run), "--search", "Winter").out
    assert "about winter" in command("features", str(run), "3").out
    assert "about winter" in command("features", str(run), "--limit", "64").out
    page = command("features", str(run), "--search", "winter", "--page", str(run / "found.html"))
    assert page.status == 0 and '"w":"about winter"' in (run / "found.html").read_text()
    assert_refused(command("features", str(run), "--search", "no such"), "no feature fires on it, promotes it")
    assert command("features", str(run), "3", "--search", "a").status == 2


def test_torch_is_quiet_about_modes(run: Path) -> None:
    """Inside inference mode the same is found."""
    having, lacking = texts("letter", 20), texts("bright", 20)
    expected = sae.find(run, having, lacking, settings=QUICK)
    shutil.rmtree(run / "probing")
    with torch.inference_mode():
        assert sae.find(run, having, lacking, settings=QUICK).features == expected.features
