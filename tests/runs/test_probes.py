"""Probes of a run folder: files, the command, resuming, staleness, and bad input."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import sae
from sae.config.file import parse_config
from sae.errors import ConfigError, DataError, ModelError
from sae.files import sums
from sae.files.writing import write_json
from sae.probing.render import letters_table, markdown
from sae.probing.scores import SplitEstimate
from sae.probing.settings import LetterConfig, ProbeConfig, describe_keys
from sae.runs import probes as of_run
from sae.runs.run import Run

QUICK = ProbeConfig(k=(1, 2), splits=1, examples=60, pca=False)
FILLER = "winter garden engine mother number silver road window question".split()


def write_set(path: Path, words: tuple[str, str], seed: int = 0, rows: int = 40) -> Path:
    """Texts that end in one of two words, and which of the two as their label."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(FILLER, k=rng.randint(3, 8))) for _ in range(2 * rows)]
    lines = ["text,label", *(f"{text} {words[number % 2]},{number % 2}" for number, text in enumerate(texts))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a barely trained dictionary of the demo model. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    text = tmp_path_factory.mktemp("text")
    for number in range(12):
        (text / f"{number}.txt").write_text(" ".join(random.Random(number).choices(FILLER, k=400)))
    config = parse_config({
        "out": str(folder), "device": "cpu",
        "data": {"source": str(text), "tokens": 4096, "held_out_tokens": 512, "holdout_fraction": 0.3,
                 "context_length": 64},
        "harvest": {"hooks": ["blocks.2.hook_resid_pre"]},
        "dictionary": {"d_sae": 256, "k": 8},
        "train": {"batch_size": 256, "tokens": 8192},
    })  # fmt: skip
    run = Run(config)
    run.harvest()
    run.train()
    return folder


@pytest.fixture
def own_run(demo_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_run, tmp_path / "run"))


@pytest.fixture(scope="module")
def demo_model() -> sae.LanguageModel:
    return sae.LanguageModel(sae.ModelConfig(name="demo"))


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch, demo_model: sae.LanguageModel) -> None:
    """Runs of the demo model share one that is loaded; others load theirs."""

    def load(config: sae.ModelConfig, *arguments: object) -> sae.LanguageModel:
        return demo_model if config.name == "demo" else sae.LanguageModel(config, "cpu")

    monkeypatch.setattr("sae.runs.run.LanguageModel", load)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for number, words in enumerate((("import", "return"), ("self", "class"), ("zero", "none"))):
        write_set(folder / f"set{number}.csv", words, seed=number)
    return folder


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the data sets that are probed, as they are."""
    names: list[str] = []
    original = of_run.probe_examples

    def count(dictionary, data, settings, name):
        names.append(name)
        return original(dictionary, data, settings, name)

    monkeypatch.setattr(of_run, "probe_examples", count)
    return names


def test_files_and_numbers(own_run: Path, sets: Path) -> None:
    record = sae.probe_run(own_run, [sets], QUICK)
    assert set(record.results) == {"set0", "set1", "set2"}
    held = json.loads((own_run / "probe.json").read_text())
    assert held["subject"]["hook"] == "blocks.2.hook_resid_pre"
    assert held["data_sets"]["set0"]["examples"] == {"0": 30, "1": 30}
    text = (own_run / "probe.md").read_text()
    for name, result in record.results.items():
        dense = result.methods["neurons-all"].scores.auc
        assert dense.value == 1, "the last token is the label"
        assert (
            held["data_sets"][name]["methods"]["latents-1"]["auc"] == result.methods["latents-1"].scores.auc.to_json()
        )
        assert f"| `{name}` | 60 | {result.methods['latents-1'].scores.auc} |" in text
    assert "## Means over 3 data sets" in text
    aucs = [result.methods["neurons-1"].scores.auc.value for result in record.results.values()]
    mean, error = sum(aucs) / 3, torch.tensor(aucs, dtype=torch.float64).std().item() / 3**0.5
    assert re.search(rf"\| 1 neuron \|.*\| {mean:.3f} ± {error:.3f} \|", text)


def test_the_numbers_are_those_of_activations_read_by_hand(
    own_run: Path, sets: Path, demo_model: sae.LanguageModel
) -> None:
    record = sae.probe_run(own_run, [sets / "set1.csv"], QUICK.model_copy(update={"examples": 80}))
    model = demo_model
    hook = "blocks.2.hook_resid_pre"
    rows, labels = [], []
    for line in (sets / "set1.csv").read_text().splitlines()[1:]:
        text, _, label = line.rpartition(",")
        tokens = torch.tensor([[model.bos, *model.tokenizer(text)["input_ids"]]])
        rows.append(model.activations(tokens, [hook])[hook][0, -1])
        labels.append(label)
    by_hand = sae.probe(sae.load(own_run), torch.stack(rows), labels, QUICK)
    for name, method in record.results["set1"].methods.items():
        assert method.scores.auc.value == pytest.approx(by_hand.methods[name].scores.auc.value, abs=0.02), name


def test_results_are_reused_only_where_nothing_differs(
    own_run: Path, sets: Path, tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(sets, tmp_path / "sets"))
    (folder / "set2.csv").unlink()
    first = sae.probe_run(own_run, [folder], QUICK)
    assert sorted(counted) == ["set0", "set1"]
    counted.clear()

    def refuse(*_: object) -> None:
        raise AssertionError("the language model was loaded")

    with monkeypatch.context() as without_model:
        without_model.setattr("sae.runs.run.LanguageModel", refuse)
        assert sae.probe_run(own_run, [folder], QUICK) == first
        assert counted == []
        other = sae.probe_run(own_run, [folder], QUICK.model_copy(update={"k": (1,)}))
        assert sorted(counted) == ["set0", "set1"], "other settings, the same activations"
        assert "latents-2" not in other.results["set0"].methods
        assert "2 latents" not in (own_run / "probe.md").read_text(), "one table has one kind of probe"
        counted.clear()
        assert sae.probe_run(own_run, [folder], QUICK) == first
        assert counted == [], "other settings in between lose nothing"
        write_set(folder / "set1.csv", ("self", "class"), seed=9)
        with pytest.raises(AssertionError, match="loaded"):
            sae.probe_run(own_run, [folder], QUICK)
    counted.clear()
    changed = sae.probe_run(own_run, [folder], QUICK)
    assert counted == ["set1"]
    assert changed.results["set0"] == first.results["set0"]
    assert changed.results["set1"] != first.results["set1"]
    counted.clear()
    dictionary = sae.load(own_run)
    torch.nn.init.normal_(dictionary.W_enc)
    dictionary.save(own_run / "dictionary")
    monkeypatch.setattr("sae.runs.run.LanguageModel", refuse)
    stale = sae.probe_run(own_run, [folder], QUICK)
    assert sorted(counted) == ["set0", "set1"], "another dictionary, the same activations"
    for name in ("set0", "set1"):
        assert stale.results[name].methods["neurons-all"] == changed.results[name].methods["neurons-all"]


def test_an_interrupted_call_goes_on_where_it_stopped(
    own_run: Path, sets: Path, monkeypatch: pytest.MonkeyPatch, counted: list[str]
) -> None:
    counting = of_run.probe_examples

    def interrupted(dictionary, data, settings, name):
        if len(counted) == 2:
            raise KeyboardInterrupt
        return counting(dictionary, data, settings, name)

    with monkeypatch.context() as patch:
        patch.setattr(of_run, "probe_examples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sae.probe_run(own_run, [sets], QUICK)
    done = list(counted)
    assert len(json.loads((own_run / "probe.json").read_text())["data_sets"]) == len(done) == 2
    assert "## Means over 2 data sets" in (own_run / "probe.md").read_text()
    resumed = sae.probe_run(own_run, [sets], QUICK)
    assert len(counted) == 3
    assert set(counted) == set(resumed.results) == {"set0", "set1", "set2"}


def test_a_seeded_sample_of_the_data_sets(own_run: Path, sets: Path) -> None:
    two = sae.probe_run(own_run, [sets], QUICK.model_copy(update={"sample": 2}))
    assert len(two.results) == 2
    again = sae.probe_run(own_run, [sets], QUICK.model_copy(update={"sample": 2}))
    assert list(again.results) == list(two.results)
    whole = sae.probe_run(own_run, [sets], QUICK)
    assert list(whole.results)[:2] == list(two.results)


def test_a_data_set_alone_has_errors_over_its_test_examples(own_run: Path, sets: Path) -> None:
    settings = QUICK.model_copy(update={"splits": 2, "ranking": "standardised"})
    [result] = sae.probe_run(own_run, [sets / "set0.csv"], settings).results.values()
    text = (own_run / "probe.md").read_text()
    scores = result.methods["latents-1"].scores
    assert f"| 1 latent | {scores.accuracy} | {scores.f1} | {scores.auc} |" in text
    assert "## `set0`" in text
    assert "data sets" not in text
    assert "60 examples. ± standard error over test examples" in text
    assert "those whose class means differ most, in standard deviations, on the training examples" in text
    first, second = (columns[0] for columns in result.methods["latents-1"].columns["1"])
    assert f"Best latent in each split, for '1': {first}, {second}." in text


def test_a_dash_in_place_of_an_error_is_explained(own_run: Path, sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = sae.probe_run(own_run, [sets / "set0.csv"], QUICK)
    assert "too few" not in markdown(record)
    original = SplitEstimate.__str__
    monkeypatch.setattr(SplitEstimate, "__str__", lambda self: original(replace(self, standard_error=None)))
    assert "over the random splits (– if there are too few)." in markdown(record)


def test_one_bad_data_set_does_not_stop_the_others(own_run: Path, sets: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sets, tmp_path / "sets"))
    (folder / "bad.csv").write_text("text,label\n" + "a,1\n" * 30)
    record = sae.probe_run(own_run, [folder], QUICK)
    assert set(record.results) == {"set0", "set1", "set2"}
    assert record.failures == {"bad": "data 'bad': all labels are '1'; at least two classes are needed"}
    assert "- bad: data 'bad': all labels are '1'" in (own_run / "probe.md").read_text()
    with pytest.raises(DataError, match="all labels are '1'"):
        sae.probe_run(own_run, [folder / "bad.csv"], QUICK)


def test_a_dot_in_a_name_does_not_mix_data_sets(own_run: Path, tmp_path: Path) -> None:
    files = [write_set(tmp_path / f"r.v{n}.csv", ("import", "return"), seed=n, rows=30 + n) for n in (1, 2)]
    for file in files:
        sae.probe_run(own_run, [file], QUICK.model_copy(update={"examples": 100}))
    results = sae.probe_run(own_run, files, QUICK.model_copy(update={"examples": 100})).results
    assert {name: sum(result.examples.values()) for name, result in results.items()} == {"r.v1": 62, "r.v2": 64}


@pytest.mark.slow
def test_names_of_all_kinds(own_run: Path, sets: Path, tmp_path: Path, command) -> None:
    names = ("new\nline", "bad\udcff", "n" * 235, "a|b`c<b>*", "\x1b[31mred\u202e", "日本語" * 20, "first.letters")
    for number, name in enumerate(names):
        write_set(tmp_path / "sets" / f"{name}.csv", ("self", "class"), seed=number)
    status, out, err = command("probe", own_run, tmp_path / "sets", "k=1", "splits=1", "examples=60", "pca=false")
    assert status == 0, err
    assert f"{len(names)} probed" in out
    record = json.loads((own_run / "probe.json").read_text())
    assert set(record["data_sets"]) == {name.replace("\udcff", "\\xff") for name in names}
    assert r"| `new\nline` |" in (own_run / "probe.md").read_text()
    assert all(len(path.name.encode()) < 200 for path in (own_run / "probing").iterdir())
    assert len(sums.read_sums(own_run / "probing")) == 2 * len(names)
    status, out, err = command("verify", own_run)
    assert status == 0, err
    status, out, err = command(
        "probe", own_run, tmp_path / "sets" / "new\nline.csv", "k=1", "splits=1", "examples=60", "pca=false"
    )
    assert r"probes on new\nline" in out
    write_set(tmp_path / "first-letters.csv", ("self", "class"))
    with pytest.raises(DataError, match="'first-letters' is another measurement; rename the file"):
        sae.probe_run(own_run, [tmp_path / "first-letters.csv"], QUICK)
    with pytest.raises(DataError, match="is called 'set0' as well; rename one"):
        sae.probe_run(own_run, [sets / "set0.csv", write_set(tmp_path / "set0.csv", ("a", "b"))], QUICK)


def test_equal_files_are_probed_once(own_run: Path, sets: Path, tmp_path: Path, counted: list[str]) -> None:
    folder = Path(shutil.copytree(sets, tmp_path / "sets"))
    shutil.copy(folder / "set0.csv", folder / "copy.csv")
    with pytest.warns(UserWarning, match=r"set0.csv': the same bytes as '.*copy.csv'; probed once, as 'copy'"):
        record = sae.probe_run(own_run, [folder], QUICK)
    assert set(record.results) == set(counted) == {"copy", "set1", "set2"}
    assert "## Means over 3 data sets" in (own_run / "probe.md").read_text()
    sae.probe_run(own_run, [folder / "set0.csv"], QUICK)
    assert "## Means over 3 data sets" in (own_run / "probe.md").read_text(), "by another name it is no fourth"
    sae.probe_run(own_run, [folder / "set1.csv"], QUICK)
    assert "## Means over 3 data sets" in (own_run / "probe.md").read_text()


def test_copies_and_what_is_left_out_are_counted(own_run: Path, tmp_path: Path) -> None:
    rng, rows = random.Random(0), []
    for number in range(40):
        text = " ".join(rng.choices(FILLER, k=8))
        rows += [{"text": text + space, "label": [0, 1.0][number % 2]} for space in ("", "\n")]
    rows += [{"text": "none", "label": float("nan")}] * 3
    path = tmp_path / "copies.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    result = sae.probe_run(own_run, [path], QUICK.model_copy(update={"examples": 100})).results["copies"]
    assert (result.examples, result.groups) == ({"0": 40, "1": 40}, 40)
    text = (own_run / "probe.md").read_text()
    assert "on the same side of every split: 40." in text
    assert "no text, no label, or no token that counts: 3." in text
    sae.probe_run(
        own_run, [write_set(tmp_path / "other.csv", ("self", "class"))], QUICK.model_copy(update={"examples": 100})
    )
    assert "of every split: `copies` 40." in (own_run / "probe.md").read_text()


def test_results_of_the_version_before_are_made_anew(own_run: Path, sets: Path, counted: list[str]) -> None:
    sae.probe_run(own_run, [sets / "set0.csv"], QUICK)
    record = json.loads((own_run / "probe.json").read_text())
    write_json(own_run / "probe.json", {**record, "format_version": 1})
    counted.clear()
    with pytest.warns(UserWarning, match=r"probe.json': written by an earlier version, .*; everything is probed again"):
        sae.probe_run(own_run, [sets / "set0.csv"], QUICK)
    assert counted == ["set0"]


def test_first_letters_of_the_demo_model(own_run: Path, sets: Path) -> None:
    sae.probe_run(own_run, [sets / "set0.csv"], QUICK)
    settings = LetterConfig(words=25, prompt="import os\n", able_f1=0.2, max_splits=2)
    record = sae.probe_run(own_run, [], letters=settings)
    assert record.letters is not None
    concepts = record.letters["concepts"]
    assert len(concepts) > 10
    for concept in concepts:
        assert concept["absorbed"] <= concept["silent"] <= concept["positives"] <= 12
        if not concept["able"]:
            assert concept["absorption_rate"]["value"] is None
    assert record.letters["able"] == sum(concept["able"] for concept in concepts)
    text = (own_run / "probe.md").read_text()
    assert "## First letters" in text
    assert "## `set0`" in text, "the table of the call before, whatever its settings"
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(letters_table(record))
    printed = console.export_text()
    assert "…" not in printed.partition("letters have")[0].replace(", …", ""), "no cell is cut at 80 columns"
    for one in concepts:
        counts = rf"{one['silent']} of {one['positives']} +{one['absorbed']} of {one['positives']}"
        assert re.search(rf"^ *{one['name']} .* {counts if one['able'] else 'not able .*'} *$", printed, re.MULTILINE)
    assert set(json.loads((own_run / "probe.json").read_text())["data_sets"]) == {"set0", "first-letters"}
    assert sae.probe_run(own_run, [], letters=settings).letters == json.loads(json.dumps(record.letters))


def test_another_model_is_refused(own_run: Path, sets: Path, tiny_model: Path) -> None:
    run = Run.open(own_run, (f"model.name={tiny_model}",))
    with pytest.raises(ModelError, match="its weights are not those that the dictionary was trained on"):
        sae.probe_run(run, [sets], QUICK)


def test_a_dictionary_of_unknown_origin_is_refused(own_run: Path, sets: Path) -> None:
    path = own_run / "dictionary" / "config.json"
    write_json(path, {**json.loads(path.read_text()), "metadata": {}})
    with pytest.raises(
        ConfigError, match="does not record which model, hook point and tokens it was trained on; probe it"
    ):
        sae.probe_run(own_run, [sets], QUICK)


def test_the_command(own_run: Path, sets: Path, command) -> None:
    status, out, err = command("probe", own_run, sets, "k=1", "splits=1", "examples=60")
    assert status == 0, err
    assert "probes on 3 data sets" in out
    assert "1 latent" in out
    table = out.partition("3 probed; tables")[0]  # the folder's name, behind it, is as long as it is
    assert max(map(len, table.splitlines())) <= 80
    assert "dense probe" in out
    assert f"3 probed; tables in {own_run / 'probe.md'}" in out.replace("\n", "")
    status, out, err = command("probe", own_run, sets / "set0.csv", "k=1", "exampels=60")
    assert (status, out) == (1, "")
    assert err.strip() == "Error: unknown setting 'exampels': did you mean examples?"
    status, out, err = command("probe", own_run / "none", sets)
    assert status == 1
    assert "no config.yaml there" in err
    status, out, err = command("probe", "--help")
    assert status == 0
    for key, _, _ in describe_keys():
        assert key in out, key
