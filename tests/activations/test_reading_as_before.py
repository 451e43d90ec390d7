"""The library that read a cache's activations is recorded, and a cache holds the activations of one only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae.activations import ActivationCache
from sae.activations.harvest import harvest
from sae.errors import CacheError
from sae.files.writing import write_json
from sae.model.hooked import BRIDGE, NATIVE
from sae.model.language_model import LanguageModel
from tests.support.harvest_case import HOOKS, Config, contents

SHARD = f"{HOOKS[0]}/train-00003.safetensors"


def with_reader(cache: ActivationCache, folder: Path, reader: str | None) -> Path:
    """A copy whose manifest names another reader, or none, as older ones do."""
    shutil.copytree(cache.path, folder)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["model"]["reader"]
    manifest["model"] |= {} if reader is None else {"reader": reader}
    write_json(folder / "manifest.json", manifest)
    return folder


def test_the_reader_is_recorded(
    tiny_cache: ActivationCache, tiny_config: Config, language_model: LanguageModel
) -> None:
    assert tiny_cache.manifest.model["reader"] == language_model.reader(HOOKS) == NATIVE
    bridged = harvest(tiny_config(harvest__hooks=["blocks.1.attn.hook_q"]), language_model)
    assert bridged.manifest.model["reader"] == BRIDGE


def test_identity_is_the_same_for_both(tiny_cache: ActivationCache, tmp_path: Path) -> None:
    other = ActivationCache(with_reader(tiny_cache, tmp_path / "cache", BRIDGE))
    assert other.manifest.identity(HOOKS[0]) == tiny_cache.manifest.identity(HOOKS[0])


@pytest.mark.parametrize("reader", [None, BRIDGE])
def test_a_cache_of_the_bridge_goes_on_with_the_bridge(
    reader: str | None, tiny_cache: ActivationCache, tiny_config: Config, language_model: LanguageModel, tmp_path: Path
) -> None:
    """A shard that was not yet written has the bridge's bits; one that was lost cannot be made by the other library."""
    config = tiny_config(harvest__cache=str(tmp_path / "cache"), harvest__hooks=HOOKS)
    folder = with_reader(tiny_cache, tmp_path / "cache", reader)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (folder / SHARD).unlink()
    before = contents(folder)
    with pytest.raises(CacheError, match=r"was made again and differs from its checksum \(other hardware, library"):
        harvest(config, language_model)
    assert contents(folder) == before
    del manifest["files"][SHARD]
    manifest["complete"] = False
    write_json(folder / "manifest.json", manifest)
    harvest(config, language_model)
    tokens = load_file(folder / "tokens/train-00003.safetensors")["tokens"].long().view(-1, 16)
    parts = [language_model.bridge_activations(part, HOOKS)[HOOKS[0]].flatten(0, 1) for part in tokens.split(4)]
    stored = load_file(folder / SHARD)["activations"]
    assert torch.equal(stored, torch.cat(parts))
    assert not torch.equal(stored, load_file(tiny_cache.path / SHARD)["activations"])


def test_a_reader_that_is_not_here_is_refused(
    tiny_cache: ActivationCache, tiny_config: Config, language_model: LanguageModel, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A complete cache needs none."""
    config = tiny_config(harvest__cache=str(tmp_path / "cache"), harvest__hooks=HOOKS)
    folder = with_reader(tiny_cache, tmp_path / "cache", NATIVE)
    monkeypatch.setattr(language_model, "_sites", lambda hooks: None)
    harvest(config, language_model)
    (folder / SHARD).unlink()
    message = "its activations were read through transformers, and here they can only be read through transformer-lens"
    with pytest.raises(CacheError, match=message):
        harvest(config, language_model)


def test_a_reader_of_old_caches_must_be_installed(
    tiny_cache: ActivationCache, tiny_config: Config, language_model: LanguageModel, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = with_reader(tiny_cache, tmp_path / "cache", None)
    (folder / SHARD).unlink()
    monkeypatch.setattr(LanguageModel, "has_bridge", False)
    with pytest.raises(CacheError, match="were read through transformer-lens, and here they can only be read through"):
        harvest(tiny_config(harvest__cache=str(folder), harvest__hooks=HOOKS), language_model)
