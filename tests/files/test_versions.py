"""Every version of our own formats that ever was is read, or made anew with nothing lost; a newer one is refused.

`versions/` holds what earlier commits wrote, in folders of their names; whole run folders are in `tests/runs/folders`
and `tests/training/checkpoints-d0ee045`. Who raises a version puts a file of the old one there, made by the commit
before, and names it in `EXAMPLES`.
"""

from __future__ import annotations

import importlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sae
from sae.dictionary import origin
from sae.dictionary.frame import Frame
from sae.effects import read_effects
from sae.effects.store import resume
from sae.errors import FormatError, SaeError
from sae.evaluation.stored import read_comparison, read_replacement
from sae.files.formats import Format
from sae.files.hashes import UnhashedWarning
from sae.files.kept import KeptResult
from sae.probing.record import ProbeRecord
from sae.runs.run import Run
from sae.training.checkpoint import STATE_VERSION, load_checkpoint

HERE, TESTS = Path(__file__).with_name("versions"), Path(__file__).parents[1]
WITHOUT_HASHES, FOLDER = (TESTS / "runs" / "folders" / name / "run" for name in ("d0ee045", "e192fda"))
ORIGIN, STATE = "origin of a dictionary", "state of a training"
EXAMPLES: dict[tuple[str, int], Path] = {
    ("sae-activations", 1): WITHOUT_HASHES / "activations" / "manifest.json",
    ("sae-dictionary", 1): FOLDER / "dictionary" / "config.json",
    ("sae-dictionary", 2): HERE / "51dc42b" / "dictionary-skip" / "config.json",
    ("sae-dictionary", 3): HERE / "078db8e" / "dictionary-transcoder" / "config.json",
    ("sae-comparison", 1): HERE / "92e28cd" / "compare.json",
    ("sae-evaluation", 1): HERE / "ae07927" / "eval.json",
    ("sae-probes", 1): HERE / "48b17f8" / "probe.json",
    (ORIGIN, 1): WITHOUT_HASHES / "dictionary" / "config.json",
    (STATE, 1): TESTS / "training" / "checkpoints-d0ee045" / "relu" / "checkpoints" / "step-00000020" / "state.pt",
    (STATE, 2): HERE / "51dc42b" / "checkpoints" / "step-00000020" / "state.pt",
    (STATE, 3): TESTS / "training" / "checkpoints-266aa39" / "topk" / "checkpoints" / "step-00000020" / "state.pt",
}
"""What is committed of each former version. tests/runs/test_old_folders.py reads the run folders, and
tests/training/test_scale.py, test_outliers.py and test_old_transcoders.py go on from the training states."""


def current_versions() -> dict[str, int]:
    """The version that is written, of every format in the package."""
    versions = {ORIGIN: origin.VERSION, STATE: STATE_VERSION}
    for path in sorted(Path(sae.__path__[0]).rglob("*.py")):
        module = ".".join(("sae", *path.relative_to(sae.__path__[0]).with_suffix("").parts)).removesuffix(".__init__")
        if module.startswith("sae.kernels") or module.endswith("__main__"):
            continue  # kernels of Triton must not be imported before their tests ask for its interpreter
        for value in vars(importlib.import_module(module)).values():
            kind = value.format if isinstance(value, KeptResult) else value
            if isinstance(kind, Format):
                versions[kind.name] = kind.version
    return versions


def missing(versions: dict[str, int]) -> list[tuple[str, int]]:
    """Former versions without an example."""
    former = {(name, number) for name, version in versions.items() for number in range(1, version)}
    return sorted(former - EXAMPLES.keys())


def version_in(name: str, path: Path) -> Any:
    """The version that a file states."""
    if name == STATE:
        return torch.load(path, weights_only=True).get("version", 1)
    record = json.loads(path.read_text(encoding="utf-8"))
    if name == ORIGIN:
        return record["metadata"].get("origin_version", 1)
    assert record["format"] == name
    return record["format_version"]


def test_every_former_version_has_an_example() -> None:
    versions = current_versions()
    assert {"sae-dictionary", "sae-activations", "sae-features", "sae-evaluation", "sae-effects"} <= versions.keys()
    assert missing(versions) == [], "add what the commit before the change wrote to tests/files/versions and EXAMPLES"
    for (name, number), path in EXAMPLES.items():
        assert (name, version_in(name, path)) == (name, number)


@pytest.mark.parametrize("name", sorted(current_versions()))
def test_raising_a_version_without_an_example_would_be_noticed(name: str) -> None:
    versions = current_versions()
    assert missing({**versions, name: versions[name] + 1}) == [(name, versions[name])]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder of e192fda, in the folder that its command ran in."""
    shutil.copytree(FOLDER.parent, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("run")


@pytest.mark.parametrize("frame", ["skip", "narrower"])
def test_dictionaries_of_version_2_are_read_as_they_were(frame: str, tmp_path: Path) -> None:
    """With a skip connection, and b_dec subtracted from the input if the widths are equal; and written as version 2."""
    folder = HERE / "51dc42b" / f"dictionary-{frame}"
    w = {name: tensor.double() for name, tensor in load_file(folder / "weights.safetensors").items()}
    x = torch.linspace(-2, 3, 24, dtype=torch.float64).sin().view(4, 6)
    read = sae.load(folder)
    pre = (x - w["b_dec"] if frame == "skip" else x) @ w["W_enc"] + w["b_enc"]
    if frame == "skip":
        pre = pre.where(pre >= pre.topk(3).values[:, -1:], 0.0)
    expected = pre.relu() @ w["W_dec"] + w["b_dec"] + x @ w["W_skip"]
    torch.testing.assert_close(read(x.float()).double(), expected, rtol=1e-5, atol=1e-5)
    read.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_a_recorded_d_out_of_equal_width_means_nothing_before_version_3(tmp_path: Path) -> None:
    folder = shutil.copytree(HERE / "51dc42b" / "dictionary-skip", tmp_path / "copy")
    with_version(folder / "config.json", d_out=6)
    assert sae.load(folder).frame == Frame(skip=True)
    with_version(folder / "config.json", format_version=3)
    assert sae.load(folder).frame == Frame(skip=True, d_out=6)


def test_a_dictionary_of_version_3_is_a_transcoder_between_equal_widths() -> None:
    """Whose features do not depend on its b_dec."""
    folder = HERE / "078db8e" / "dictionary-transcoder"
    dictionary, parts = sae.load(folder), load_file(folder / "weights.safetensors")
    assert dictionary.frame == Frame(d_out=6) and not dictionary.is_crosscoder
    x = torch.linspace(-2, 2, 12).view(2, 6)
    pre = x @ parts["W_enc"] + parts["b_enc"]
    expected = pre.relu() * torch.zeros_like(pre).scatter(1, pre.topk(3, dim=1).indices, 1.0)
    torch.testing.assert_close(dictionary.encode(x), expected)


def place(example: str, run: Path) -> Path:
    """Put an example in the place of the run's own file, without the hash of that."""
    path = run / Path(example).name
    shutil.copy(HERE / example, path)
    (run / "SHA256SUMS").unlink(missing_ok=True)
    warnings.simplefilter("ignore", UnhashedWarning)
    return path


def test_evaluations_of_version_1_are_stale_and_stay(run: Path) -> None:
    path = place("ae07927/eval.json", run)
    before = path.read_bytes()
    opened = Run.open(run)
    assert not opened.is_evaluated()
    with pytest.raises(FormatError, match=r"no evaluation of this dictionary.*make it with 'sae eval run'"):
        opened.report()
    assert path.read_bytes() == before


def test_comparisons_of_version_1_are_stale(run: Path) -> None:
    place("92e28cd/compare.md", run)
    path = place("92e28cd/compare.json", run)
    assert read_comparison(run) is None
    assert path.is_file()


def test_probes_of_version_1_are_stale_and_say_why(run: Path) -> None:
    path = place("48b17f8/probe.json", run)
    subject = json.loads(path.read_text(encoding="utf-8"))["subject"]
    with pytest.warns(UserWarning, match=r"probe.json': written by an earlier version"):
        assert ProbeRecord.read(run, subject).entries == {}


@pytest.mark.parametrize("commit", ["48b17f8", "8c2d382"])
def test_effects_are_read(commit: str) -> None:
    """The numbers are those of the file."""
    warnings.simplefilter("ignore", UnhashedWarning)
    path = HERE / commit / "effects.json"
    record, effects = json.loads(path.read_text(encoding="utf-8")), read_effects(path)
    assert len(effects.features) == len(record["features"]) > 0
    for entry in record["features"]:
        effect = effects[entry["feature"]]
        assert (effect.positions, effect.density) == (entry["positions"], entry["density"])
        for metric in ("loss", "kl") if entry["positions"] else ():
            assert getattr(effect, metric).value == entry[metric]["value"]


def with_version(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file, which has no hash then."""
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**record, **changes}), encoding="utf-8")
    (path.parent / "SHA256SUMS").unlink(missing_ok=True)
    warnings.simplefilter("ignore", UnhashedWarning)


def newer(name: str, run: Path) -> tuple[Path, Callable[[], Any]]:
    """A file of the version after the current one, and what reads it."""
    head, metadata = {"format_version": current_versions().get(name, 0) + 1}, run / "dictionary" / "config.json"
    if name == "sae-dictionary":
        with_version(metadata, **head)
        return metadata, lambda: sae.load(run)
    if name == ORIGIN:
        with_version(metadata, metadata={"origin_version": origin.VERSION + 1})
        return metadata, lambda: sae.load(run)
    if name == STATE:
        path = run / "checkpoints" / "step-00000024"
        state = torch.load(path / "state.pt", weights_only=True)
        torch.save({**state, "version": STATE_VERSION + 1}, path / "state.pt")
        (path / "SHA256SUMS").unlink(missing_ok=True)
        warnings.simplefilter("ignore", UnhashedWarning)
        return path / "state.pt", lambda: load_checkpoint(path)
    files: dict[str, tuple[str, Callable[[], Any]]] = {
        "sae-attribution": ("attribution.json", lambda: sae.Attribution.load(run / "attribution.json")),
        "sae-activations": ("activations/manifest.json", lambda: sae.ActivationCache(run)),
        "sae-features": ("features/features.json", lambda: sae.Features(run)),
        "sae-evaluation": ("eval.json", lambda: Run.open(run).is_evaluated()),
        "sae-effects": ("effects.json", lambda: read_effects(run)),
        "sae-comparison": ("compare.json", lambda: read_comparison(run)),
        "sae-replacement": ("replacement.json", lambda: read_replacement(run)),
        "sae-probes": ("probe.json", lambda: ProbeRecord.read(run, {})),
        "sae-superposition": ("superposition.json", lambda: sae.superposition.run(run)),
    }
    path, read = run / files[name][0], files[name][1]
    if not path.exists():
        path.write_text(json.dumps({"format": name}), encoding="utf-8")
        for beside in ("compare.md", "replacement.md", "effects.safetensors"):
            (run / beside).touch()
    with_version(path, **head)
    return path, read


@pytest.mark.parametrize("name", sorted(current_versions().keys() - {"sae-concept"}))  # which nothing reads again
def test_a_newer_version_is_refused_and_stays(name: str, run: Path) -> None:
    path, read = newer(name, run)
    before = path.read_bytes()
    number = current_versions()[name]
    with pytest.raises(SaeError, match=rf"(?s){number + 1}.*({number}\)|1 to {number}).*(update|choose another)"):
        read()
    assert path.read_bytes() == before


def test_newer_effects_are_not_replaced_by_the_next_measurement(run: Path) -> None:
    newer("sae-effects", run)
    with pytest.raises(FormatError, match="update the package, or move the file elsewhere"):
        resume(run, "0" * 64, 0.0)
