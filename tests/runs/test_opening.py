"""Dictionaries without a run folder: measured like our own, resumed, and refused with a way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sae
from sae.activations import shards
from sae.config.settings import RunConfig
from sae.effects import EffectSettings
from sae.errors import CacheError, ConfigError, FormatError, ModelError
from sae.probing.settings import ProbeConfig
from sae.runs import opening
from sae.runs.comparison import compare_folders
from sae.runs.opening import open_run, open_runs
from sae.runs.run import Run
from sae.training.recipe import chosen_settings
from tests.conftest import make_tiny_config
from tests.support.quick import quick_for

HOOK = "blocks.1.hook_resid_post"
WORDS = (
    "data.tokens=1000", "data.held_out_tokens=200", "data.holdout_fraction=0.25", "data.context_length=16",
    "harvest.dtype=float32", "harvest.batch_contexts=4", "harvest.shard_contexts=8",
    "evaluation.downstream_tokens=96", "evaluation.legacy_tokens=64", "evaluation.frozen_decoder_tokens=256",
    "device=cpu",
)  # fmt: skip
NOT_COMPARED = ("seconds", "training_token_policy", "dead", "model")
"""Entries of `eval.json` that differ by what is known of the training; counts of dead features are compared apart."""
FORMATS = ("saelens", "sparsify", "dictionary_learning", "sae")


def tiny_run(tiny_model: Path, text_folder: Path, out: Path) -> RunConfig:
    evaluation = {"downstream_tokens": 96, "legacy_tokens": 64, "frozen_decoder_tokens": 256}
    overrides = {f"evaluation.{key}": value for key, value in evaluation.items()}
    overrides |= {"harvest.hooks": [HOOK], "train.tokens": 2000, "device": "cpu"}
    return make_tiny_config(tiny_model, text_folder, out, overrides)


@pytest.fixture(scope="module")
def own(tiny_model: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of our own, with everything measured. Read only."""
    run = Run(tiny_run(tiny_model, text_folder, tmp_path_factory.mktemp("own") / "run"))
    run.harvest()
    run.train()
    run.evaluate()
    run.features()
    return run


@pytest.fixture(scope="module")
def foreign(own: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The same dictionary in the files of a toolkit. Read only."""
    folder = tmp_path_factory.mktemp("foreign")

    def written(to: str) -> Path:
        place = folder / to / "layers.1"  # sparsify names the folder after the module
        if not place.exists():
            sae.convert(own.folder, place, to)
        return place

    return written


@pytest.fixture
def opened(
    foreign: Callable[[str], Path], tiny_model: Path, text_folder: Path, tmp_path: Path
) -> Callable[..., Run]:  # fmt: skip
    """Opens the dictionary in a format as a run in this test's folder."""

    def call(to: str, *words: str, **options: Any) -> Run:
        arguments = {"model": tiny_model, "data": text_folder, "out": tmp_path / "run", **options}
        return open_run(foreign(to), (*WORDS, *words), **arguments)

    return call


def shared(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in NOT_COMPARED}


@pytest.mark.parametrize("to", quick_for({"saelens"}, FORMATS))
def test_every_verb_gives_the_numbers_of_our_own_run(
    to: str, own: Run, opened: Callable[..., Run], tmp_path: Path
) -> None:
    run = opened(to)
    assert run.config.hook == run.config.gives == HOOK
    report, expected = run.evaluate(), json.loads((own.folder / "eval.json").read_bytes())
    found = json.loads((run.folder / "eval.json").read_bytes())
    assert shared(found) == shared(expected)
    assert found["dead"]["features"] == expected["dead"]["features"]
    assert report.scores.downstream is not None
    run.features()
    columns = [(one.folder / "features" / "features.safetensors").read_bytes() for one in (run, own)]
    assert columns[0] == columns[1]

    firing = [int(feature) for feature in run.features().summary().density.argsort()[-3:]]
    settings = EffectSettings(positions=4, null_positions=2, window=3)
    effects = [
        sae.measure_effects(
            one.dictionary(), one.cache(), one.language_model, hook=HOOK, features=firing, settings=settings
        ).features
        for one in (run, own)
    ]
    assert effects[0] == effects[1] and len(effects[0]) == 3

    texts = tmp_path / "texts.csv"
    rows = (f"the {'river' if number % 2 else 'stone'} number {number} opens,{number % 2}" for number in range(60))
    texts.write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    copy = Path(shutil.copytree(own.folder, tmp_path / "copy"))
    probes = [sae.probe_run(one, [texts], ProbeConfig(k=(1, 2), splits=1)).results for one in (run, copy)]
    assert probes[0]["texts"].to_json() == probes[1]["texts"].to_json()


def test_what_the_files_say_decides_the_configuration(
    own: Run, foreign: Callable[[str], Path], tiny_model: Path, text_folder: Path, tmp_path: Path
) -> None:
    settings = json.loads((foreign("saelens") / "cfg.json").read_bytes())
    place = Path(shutil.copytree(foreign("saelens"), tmp_path / "changed", ignore=shutil.ignore_patterns("SHA256SUMS")))
    settings["metadata"] |= {
        "context_size": 24, "prepend_bos": False, "exclude_special_tokens": None, "seqpos_slice": [3, None],
        "model_from_pretrained_kwargs": {"fold_ln": True},
    }  # fmt: skip
    (place / "cfg.json").write_text(json.dumps(settings))
    run = open_run(place, ("data.tokens=480", "data.held_out_tokens=120"), model=tiny_model, data=text_folder,
                   out=tmp_path / "run")  # fmt: skip
    config = Run.open(run.folder).config
    assert (config.data.context_length, config.data.prepend_bos) == (24, False)
    assert (config.harvest.masked_positions, config.harvest.mask_special_tokens) == (3, True)
    assert config.model.weight_processing == "fold_ln"
    assert (config.dictionary.architecture, config.dictionary.d_sae, config.dictionary.k) == ("topk", 64, 4)
    assert config.data.holdout_fraction == 0.2, "120 of 600 tokens"
    del settings["metadata"]["seqpos_slice"]
    (place / "cfg.json").write_text(json.dumps(settings))
    config = opening.config_of(opening.at_hooks(sae.load(place), "it", None, None), "it", ["model.name=a"])
    assert config.harvest.masked_positions == 1, "the first position would decide every mean"
    assert config.harvest.batch_contexts == 32 and config.evaluation.batch_contexts == 16
    settings["metadata"]["context_size"] = 2048
    (place / "cfg.json").write_text(json.dumps(settings))
    config = opening.config_of(opening.at_hooks(sae.load(place), "it", None, None), "it", ["model.name=a"])
    assert (config.harvest.batch_contexts, config.evaluation.batch_contexts) == (2, 1)


@pytest.mark.parametrize(("documents", "words", "unit"), [
    (19, (), "section"), (20, (), None), (2, ("data.holdout_by=document",), "document"),
])  # fmt: skip
def test_few_documents_are_divided_into_sections(
    documents: int, words: tuple[str, ...], unit: str | None, own: Run, tmp_path: Path
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(documents):
        (texts / f"{number}.txt").write_text(f"text {number}", encoding="utf-8")
        (texts / f"{number}-again.txt").write_text(f"text {number}", encoding="utf-8")
    chosen = [f"data.source={json.dumps(str(texts))}", "model.name=a", *words]
    config = opening.config_of(own.dictionary(), "it", chosen)
    assert opening.divided(config, lambda *_: None).data.holdout_by == unit
    missing = config.model_copy(update={"data": config.data.model_copy(update={"source": "x" * 300})})
    assert opening.divided(missing, lambda *_: None).data == missing.data


def test_the_same_arguments_find_the_folder_and_others_get_another(
    foreign: Callable[[str], Path], tiny_model: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = []
    original = opening.harvest_activations
    monkeypatch.setattr(
        opening, "harvest_activations", lambda *arguments: (loaded.append(1), original(*arguments))[1]
    )  # fmt: skip
    place = foreign("saelens")
    first = open_run(place, WORDS, model=tiny_model, data=text_folder)
    assert first.folder.parent == Path("runs") and first.folder.name.startswith("saelens-layers_1-")
    again = open_run(place, (*WORDS, "evaluation.tokens=64"), model=tiny_model, data=text_folder)
    assert again.folder == first.folder and again.config.evaluation.tokens == 64
    assert len(loaded) == 1
    fewer = [word for word in WORDS if not word.startswith("data.held_out")]
    other = open_run(place, (*fewer, "data.held_out_tokens=100"), model=tiny_model, data=text_folder)
    assert other.folder != first.folder and len(loaded) == 2
    assert sorted(path.name for path in Path("runs").iterdir()) == sorted([first.folder.name, other.folder.name])
    assert sae.verify(first.folder)[1] == []
    by_folder = Run.open(first.folder)
    assert by_folder.cache().manifest.identity(HOOK) == first.cache().manifest.identity(HOOK)


def test_a_folder_of_other_arguments_is_refused(opened: Callable[..., Run], own: Run, tmp_path: Path) -> None:
    run = opened("saelens")
    before = (run.folder / "config.yaml").read_bytes()
    with pytest.raises(CacheError, match=r"made with data.held_out_tokens=200, now 100 is asked for"):
        opened("saelens", "data.held_out_tokens=100")
    with pytest.raises(ConfigError, match=r"made with dictionary.reads='blocks.1.hook_resid_post', now"):
        open_run(
            unplaced(sae.load(own.folder)), WORDS, model=own.config.model.name, data=own.config.data.sources,
            out=run.folder, hook="blocks.2.hook_resid_pre",
        )  # fmt: skip
    changed = sae.load(own.folder)
    changed.W_enc.mul_(1.5)
    changed.save(tmp_path / "changed")
    with pytest.raises(ConfigError, match=r"holds another dictionary; choose another folder \(--out\)"):
        open_run(tmp_path / "changed", WORDS, model=own.config.model.name, data=own.config.data.sources, out=run.folder)
    assert (run.folder / "config.yaml").read_bytes() == before
    untrained = tmp_path / "untrained"
    Run(own.config.model_copy(update={"out": str(untrained)})).harvest()
    with pytest.raises(ConfigError, match=r"its dictionary is not trained yet; choose another folder"):
        opened("saelens", out=untrained)


def unplaced(dictionary: sae.Dictionary) -> sae.Dictionary:
    dictionary.metadata = {}
    return dictionary


def test_a_dictionary_in_python_and_its_hook_point(own: Run, tmp_path: Path) -> None:
    dictionary = unplaced(sae.load(own.folder))
    run = open_run(
        dictionary, WORDS, model=own.config.model.name, data=own.config.data.source, hook=HOOK, out=tmp_path / "run"
    )
    assert dictionary.metadata == {}, "the caller's is not changed"
    assert run.dictionary().origin.reads.hook == HOOK
    fvu = json.loads((own.folder / "eval.json").read_bytes())["fvu"]
    assert json.loads(json.dumps(run.evaluate().to_json()))["fvu"] == fvu


class _StoppedError(Exception):
    pass


def test_interrupted_anywhere_it_resumes(
    opened: Callable[..., Run], own: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, written = tmp_path / "run", []
    original = shards.Harvester._write

    def stopping(self: Any, *arguments: Any, **options: Any) -> Any:
        if len(written) == 2:
            raise _StoppedError
        written.append(1)
        return original(self, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(shards.Harvester, "_write", stopping)
        with pytest.raises(_StoppedError):
            opened("saelens")
    assert not (folder / "config.yaml").exists(), "it is written last"
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*hook_resid_post/*.safetensors")}
    assert kept
    with monkeypatch.context() as patched:
        patched.setattr(opening, "configured", stopping_at_once)
        with pytest.raises(_StoppedError):
            opened("saelens")
    assert not (folder / "config.yaml").exists() and (folder / "dictionary" / "config.json").exists()
    run = opened("saelens")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "nothing is harvested again"
    found = run.evaluate().to_json()
    assert shared(json.loads(json.dumps(found))) == shared(json.loads((own.folder / "eval.json").read_bytes()))
    shutil.rmtree(folder / "activations")
    assert opened("saelens").cache().manifest.identity(HOOK) == run.cache().manifest.identity(HOOK)


def stopping_at_once(*_: Any) -> Any:
    raise _StoppedError


def test_several_share_model_and_activations(
    foreign: Callable[[str], Path], own: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changed = sae.load(own.folder)
    changed.W_dec.neg_()
    changed.save("other")
    runs = open_runs(
        [foreign("saelens"), "other"], WORDS, model=own.config.model.name, data=own.config.data.source
    )  # fmt: skip
    assert runs[0].language_model is runs[1].language_model
    assert runs[1].config.cache_folder == runs[0].folder / "activations"
    assert not (runs[1].folder / "activations").exists()
    with pytest.raises(ConfigError, match="--out names one folder for 2 dictionaries"):
        open_runs(["a", "b"], model="demo", data="texts", out="runs/x")


def test_a_comparison_without_any_run(foreign: Callable[[str], Path], own: Run, monkeypatch: pytest.MonkeyPatch,
                                      tmp_path: Path) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    changed = sae.load(own.folder)
    changed.W_dec.mul_(0.5)
    sae_folder = tmp_path / "halved"
    changed.save(sae_folder)
    made = compare_folders(
        [foreign("saelens"), sae_folder], overrides=WORDS, model=own.config.model.name, data=own.config.data.sources
    )  # fmt: skip
    expected = compare_folders([own.folder, sae_folder])
    assert list(made.dictionaries) == ["layers.1", "halved"]
    for mine, theirs in zip(made.dictionaries.values(), expected.dictionaries.values(), strict=True):
        assert (mine.metrics, mine.differences) == (theirs.metrics, theirs.differences)
    with pytest.raises(ConfigError, match="--on names the run that supplies texts and model"):
        compare_folders([foreign("saelens"), sae_folder], on=own.folder, model="demo", data=["texts"])


def test_a_run_s_dictionary_on_other_texts(own: Run, tmp_path: Path, text_folder: Path) -> None:
    for number, path in enumerate(sorted(text_folder.iterdir())):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{number}.txt").write_text(path.read_text(encoding="utf-8").upper(), encoding="utf-8")
    run = open_run(own.folder, WORDS, model=own.config.model.name, data=tmp_path / "texts", out=tmp_path / "run")
    assert run.folder != own.folder
    configs = [chosen_settings(one.config.dictionary, one.config.train) for one in (run, own)]
    assert configs[0] == configs[1] and configs[0]["batch_size"] == 64
    report = run.evaluate()
    ours = json.loads((own.folder / "eval.json").read_bytes())
    assert report.dictionary["weights_sha256"] == ours["dictionary"]["weights_sha256"]
    assert report.scores.reconstruction.fvu.value != ours["fvu"]["value"]
    with pytest.raises(FormatError, match=r"made with activations='\w+', now '\w+' is asked for"):
        Run.open(run.folder).train()


def test_a_dictionary_of_another_toolkit_is_not_trained_on(opened: Callable[..., Run]) -> None:
    run = opened("saelens")
    with pytest.raises(FormatError, match=r"made with trained_by='SAELens 6.54.12', now 'sae' is asked for; choose"):
        Run.open(run.folder, ("train.batch_size=64",)).train()


def test_what_needs_no_texts_gets_no_folder(
    foreign: Callable[[str], Path], own: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = open_run(foreign("saelens"), model=tiny_model, needs_texts=False)
    assert run.config.hook == HOOK and run.language_model.info.n_layers == 3
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run.dictionary("cpu")(x), sae.load(foreign("saelens"))(x), rtol=0, atol=0)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="give them with --data"):
        run.cache()
    assert open_run(own.folder, needs_texts=False).folder == own.folder


def test_missing_arguments_are_named(
    foreign: Callable[[str], Path], own: Run, tiny_model: Path, text_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ConfigError, "no config.yaml there; make a run with .* or for a dictionary of any toolkit give", {}),
        (ConfigError, "give texts with --data", {"model": tiny_model}),
        (ModelError, "the dictionary's files name this model; give another with --model", {"data": text_folder}),
        (ConfigError, r"was trained on 'blocks.1.hook_resid_post', not 'blocks.2.hook_mlp_out'; leave --hook out",
         {"model": tiny_model, "data": text_folder, "hook": "blocks.2.hook_mlp_out"}),
    ]  # fmt: skip
    for error, message, options in refused:
        with pytest.raises(error, match=message):
            open_run(foreign("saelens"), **options)
    with pytest.raises(ConfigError, match="has a model and texts of its own, so --model has no effect"):
        open_run(own.folder, model="demo")
    with pytest.raises(FormatError, match=r"no config.json there; give a dictionary folder or a run folder"):
        open_run(tmp_path / "nothing", model=tiny_model, data=text_folder)
    silent_one = unplaced(sae.load(own.folder))
    unknown: tuple[tuple[str, dict[str, Any]], ...] = (
        ("do not say which hook point it reads; give the hook point with --hook", {"model": tiny_model}),
        ("its files do not name its language model; give it with --model", {"hook": HOOK}),
        ("block 1 of tiny has no mlp.hook_pre_linear", {"hook": "blocks.1.mlp.hook_pre_linear", "model": tiny_model}),
        ("activations have 128 numbers, the dictionary takes 32", {"hook": "blocks.1.mlp.hook_post",
                                                                   "model": tiny_model}),
    )  # fmt: skip
    for message, options in unknown:
        with pytest.raises((ConfigError, ModelError), match=message):
            open_run(silent_one, WORDS, data=text_folder, **options)
    named_otherwise = sae.load(own.folder)
    named_otherwise.metadata = {"hook": "layers.1.output"}
    with pytest.raises(ConfigError, match=r"its files name 'layers.1.output', which is no hook point; give the"):
        open_run(named_otherwise, model=tiny_model, data=text_folder)
    transcoder = unplaced(sae.load(own.folder))
    transcoder.metadata = {"converted": {"format": "sparsify", "settings": {"transcode": True}}}
    with pytest.raises(ConfigError, match="is a transcoder, but not what it gives; give the hook point with --target"):
        open_run(transcoder, model=tiny_model, data=text_folder, hook="blocks.1.mlp.hook_in")
    processed = sae.load(own.folder)
    processed.metadata["model"] = {"name": "tiny", "weight_processing": "center_and_fold"}
    with pytest.raises(ModelError, match="weight_processing is 'none' there and 'center_and_fold' in training"):
        open_run(processed, (*WORDS, "model.weight_processing=none"), model=tiny_model, data=text_folder)
    assert not (tmp_path / "runs").exists(), "nothing is left of what was refused"
