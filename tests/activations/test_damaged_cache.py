from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sae
from sae.errors import CacheError, DamagedError
from sae.files.writing import write_json
from sae.runs.verification import verify


@pytest.mark.parametrize("name", ["../outside.bin", "/etc/passwd", "tokens/../../outside.bin"])
def test_a_manifest_does_not_lead_out_of_its_folder(write_cache, name: str) -> None:
    cache = write_cache(torch.zeros(32, 4), torch.ones(32, dtype=torch.long))
    manifest = json.loads((cache.path / "manifest.json").read_bytes())
    manifest["files"][name] = manifest["files"].pop("tokens/train-00000.safetensors")
    write_json(cache.path / "manifest.json", manifest)
    for read in (sae.ActivationCache, lambda path: verify(path)[1][0]):
        try:
            reason = str(read(cache.path))
        except CacheError as error:
            reason = str(error)
        assert f"files: '{name}' leads out of the cache" in reason


def test_a_shard_that_is_a_link_to_elsewhere_is_not_read(write_cache, tmp_path: Path) -> None:
    cache = write_cache(torch.zeros(32, 4), torch.ones(32, dtype=torch.long))
    shard = cache.path / "tokens" / "train-00000.safetensors"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedError, match=r"train-00000.safetensors': leads out of the cache"):
        cache.token_shard("train", 0)
    assert "leads out of the cache" in verify(cache.path)[1][0]


def test_a_shard_changed_while_it_is_mapped_is_found(write_cache) -> None:
    hook = "blocks.0.hook_resid_pre"
    cache = write_cache(torch.ones(32, 4), torch.ones(32, dtype=torch.long))
    before, _ = cache.activation_shard(hook, "train", 0)
    assert before.sum() == 128
    path = cache.path / hook / "train-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    with pytest.raises(DamagedError, match="damaged or changed"):
        cache.activation_shard(hook, "train", 0)
