"""Run folders of older versions are read and resumed: `folders/` holds what two commits wrote, `sweeps/` a sweep.

Each was made by `sae run` of that commit with the demo model, and keeps one checkpoint, of step 24 of 48; the sweep by
`sae sweep`, and it keeps none.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch

import sae
from sae.files.hashes import UnhashedWarning
from sae.runs.run import Run
from sae.runs.variants import variants

FOLDERS = Path(__file__).with_name("folders")
WITHOUT_HASHES = "d0ee045"


@pytest.fixture(params=[path.name for path in sorted(FOLDERS.iterdir())])
def old(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a run folder, in the folder that its command ran in."""
    shutil.copytree(FOLDERS / request.param, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if request.param == WITHOUT_HASHES:
        warnings.simplefilter("ignore", UnhashedWarning)
    return Path("run")


def test_its_parts_are_read(old: Path) -> None:
    dictionary, cache = sae.load(old), sae.ActivationCache(old)
    assert (dictionary.d_sae, dictionary.settings()["k"]) == (16, 2)
    assert (cache.rows("train"), cache.rows("held_out")) == (768, 192)
    x = next(iter(cache.contexts("held_out", cache.hooks[0]))).activations
    assert x is not None and torch.isfinite(dictionary(x)).all()
    assert len(sae.Features(old)) == 16
    _, problems = sae.verify(old)
    assert problems == []


def test_nothing_is_made_again(old: Path) -> None:
    """The settings are those of the folder, an old key among them, so that its cache and its dictionary are used."""
    assert "products: auto" in (old / "config.yaml").read_text()
    run = Run.open(old)
    weights = (old / "dictionary" / "weights.safetensors").read_bytes()
    run.harvest()
    assert run.train().d_sae == 16
    assert (old / "dictionary" / "weights.safetensors").read_bytes() == weights
    assert "language_model" not in vars(run), "the model was not needed"
    assert run.is_evaluated() == (WITHOUT_HASHES not in (old / "config.yaml").read_text().splitlines()[0])


def test_training_goes_on_from_its_checkpoint(old: Path) -> None:
    finished = sae.load(old)
    shutil.rmtree(old / "dictionary")
    resumed = Run.open(old).train()
    for (name, expected), parameter in zip(finished.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_a_sweep_of_8c2d382_is_used_under_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders have had a hyphen before a value that is a word since then."""
    shutil.copytree(FOLDERS.with_name("sweeps") / "8c2d382", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    made = variants(sae.load_config("run/config.yaml"))
    assert list(made) == ["encoder_dtypefloat32", "encoder_dtypebfloat16"]
    for name, config in made.items():
        run, before = Run(config), (Path("run") / name / "dictionary" / "weights.safetensors").read_bytes()
        assert config.train.encoder_dtype == name.removeprefix("encoder_dtype")
        assert run.train().d_sae == 16
        assert (Path("run") / name / "dictionary" / "weights.safetensors").read_bytes() == before
        assert "language_model" not in vars(run), "the model was not needed"
    for path in Path("run").glob("encoder*"):
        path.rename(path.with_name(path.name.replace("dtype", "dtype-")))
    assert list(variants(sae.load_config("run/config.yaml"))) == ["encoder_dtype-float32", "encoder_dtype-bfloat16"]
