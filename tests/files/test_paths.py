"""Paths as a user writes them: home folders that there are, and those that there are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae.activations import ActivationCache
from sae.config.file import load_config
from sae.config.mixture import source_labels
from sae.config.sources import ModelConfig
from sae.dictionary.model_identity import fingerprint, model_label
from sae.dictionary.saved import read_saved
from sae.errors import CacheError, FormatError, ModelError
from sae.files.paths import expanded
from sae.model.language_model import LanguageModel

NOBODY = "~nosuchuser/x"


def test_home_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/x") == expanded(Path("~/x")) == Path("/home/me/x")
    assert expanded(NOBODY) == expanded(Path(NOBODY)) == Path(NOBODY)


def test_the_home_folder_of_nobody_ends_in_no_other_error() -> None:
    config = load_config(None, [f"out={NOBODY}", f"harvest.cache={NOBODY}/cache", f"model.name={NOBODY}"])
    assert (config.folder, config.cache_folder) == (Path(NOBODY), Path(NOBODY) / "cache")
    assert (model_label(NOBODY), fingerprint(NOBODY), source_labels(["~nosuchuser/.."])) == (
        "x",
        None,
        (Path.cwd().name,),
    )
    with pytest.raises(ModelError, match=NOBODY):
        LanguageModel(ModelConfig(name=NOBODY))
    with pytest.raises(CacheError, match=NOBODY):
        ActivationCache(NOBODY)
    with pytest.raises(FormatError, match=NOBODY):
        read_saved(NOBODY)
