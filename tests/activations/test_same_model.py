"""A cache is used with the model that made it: hashes tell, and activations where hashes cannot."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sae.activations import ActivationCache
from sae.activations.harvest import harvest
from sae.activations.same_model import check_same_model
from sae.config.settings import RunConfig
from sae.config.sources import ModelConfig
from sae.dictionary.model_identity import fingerprint, has_fingerprint
from sae.errors import CacheError
from sae.files.writing import write_json
from sae.model.language_model import LanguageModel

Config = Callable[..., RunConfig]
Change = Callable[[dict[str, Any]], None]
SHARD = "blocks.1.hook_resid_pre/train-00001.safetensors"


def changed_model(tiny_model: Path, folder: Path, file: str, change: Change) -> LanguageModel:
    """The tiny model with the same weights and another JSON file."""
    shutil.copytree(tiny_model, folder)
    content = json.loads((folder / file).read_bytes())
    change(content)
    (folder / file).write_text(json.dumps(content))
    return LanguageModel(ModelConfig(name=str(folder)))


def older(cache: ActivationCache, folder: Path) -> ActivationCache:
    """A copy as versions made it that knew nothing of configurations and the tokenizer's rules."""
    shutil.copytree(cache.path, folder)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for key in ("config_sha256", "tokenizer_ids_sha256", "library"):
        del manifest["model"][key]
    write_json(folder / "manifest.json", manifest)
    return ActivationCache(folder)


def test_the_same_model_from_another_folder_is_the_same(
    tiny_cache: ActivationCache, tiny_model: Path, tmp_path: Path
) -> None:
    def change(config: dict[str, Any]) -> None:
        config.update(use_cache=False, _name_or_path="elsewhere", transformers_version="4.0.0", resid_pdrop=0.1)

    check_same_model(tiny_cache, changed_model(tiny_model, tmp_path / "copy", "config.json", change))


@pytest.mark.parametrize(
    ("entry", "value"), [("activation_function", "relu"), ("n_head", 4), ("layer_norm_epsilon", 0.1)]
)
def test_another_configuration_with_the_same_weights_is_another_model(
    entry: str, value: object, tiny_cache: ActivationCache, tiny_model: Path, tmp_path: Path
) -> None:
    def change(config: dict[str, Any]) -> None:
        assert config[entry] != value
        config[entry] = value

    other = changed_model(tiny_model, tmp_path / "other", "config.json", change)
    with pytest.raises(CacheError, match="of another model: config_sha256 is"):
        check_same_model(tiny_cache, other)
    with pytest.raises(CacheError, match=r"activations of 'other' at blocks.1.hook_resid_pre differ from those in it"):
        check_same_model(older(tiny_cache, tmp_path / "older"), other)


def test_another_version_of_the_library_may_write_another_configuration(
    tiny_cache: ActivationCache, language_model: LanguageModel, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_cache.path, tmp_path / "cache")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["model"].update(library="transformers 4.0.0", config_sha256="0" * 64)
    write_json(folder / "manifest.json", manifest)
    check_same_model(ActivationCache(folder), language_model)
    manifest["model"]["library"] = tiny_cache.manifest.model["library"]
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(CacheError, match="config_sha256"):
        check_same_model(ActivationCache(folder), language_model)


def test_a_tokenizer_of_the_same_words_and_other_rules_is_another(
    tiny_cache: ActivationCache, tiny_model: Path, tmp_path: Path
) -> None:
    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:10]

    other = changed_model(tiny_model, tmp_path / "other", "tokenizer.json", change)
    assert other.info.tokenizer_sha256 == tiny_cache.manifest.model["tokenizer_sha256"]
    with pytest.raises(CacheError, match="of another model: tokenizer_ids_sha256 is"):
        check_same_model(tiny_cache, other)


def test_every_byte_of_a_small_model_counts(
    tiny_config: Config, tiny_model: Path, language_model: LanguageModel, tmp_path: Path
) -> None:
    """Without loading the model."""
    harvest(tiny_config(), language_model)
    copy = shutil.copytree(tiny_model, tmp_path / "other" / "tiny")
    weights = load_file(copy / "model.safetensors")
    weights["transformer.h.0.ln_1.weight"][0] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CacheError, match=r"of another model: the weights of '.*tiny' are not those it was made with"):
        harvest(tiny_config(model__name=str(copy)), LanguageModel(ModelConfig(name=str(copy))))
    with pytest.raises(CacheError, match=r"of another model: weights_sha256 is '[0-9a-f]+' there and '[0-9a-f]+' in"):
        check_same_model(ActivationCache(tiny_config().cache_folder), LanguageModel(str(copy)))


def test_fingerprints_of_older_versions_hold(tiny_model: Path) -> None:
    """They are of the size and of 4 KB at the beginning of each 64 KB."""
    content = (tiny_model / "model.safetensors").read_bytes()
    samples = b"".join(content[place : place + 4096] for place in range(0, len(content), 1 << 16))
    older = hashlib.sha256(f"{len(content)} ".encode() + samples).hexdigest()
    assert older != fingerprint(str(tiny_model))
    assert has_fingerprint(str(tiny_model), older) and has_fingerprint(str(tiny_model), fingerprint(str(tiny_model)))
    assert has_fingerprint(str(tiny_model), "0" * 64) is False
    assert has_fingerprint(str(tiny_model), None) is has_fingerprint("gpt2", older) is None


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_number_types_of_a_cache_are_no_other_model(
    dtype: str, tiny_config: Config, language_model: LanguageModel
) -> None:
    check_same_model(harvest(tiny_config(harvest__dtype=dtype), language_model), language_model)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_twentieth_is_noticed(
    dtype: str, tiny_config: Config, language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of the same hash may be computed with otherwise: a library's mistake, say."""
    cache = harvest(tiny_config(harvest__dtype=dtype), language_model)
    own = language_model.activations
    monkeypatch.setattr(language_model, "activations", lambda *a: {k: 1.05 * x for k, x in own(*a).items()})
    with pytest.raises(CacheError, match=r"differ from those in it by 0.04[78] of their norm"):
        check_same_model(cache, language_model)


def test_an_unfinished_cache_is_not_gone_on_with_by_another_configuration(
    tiny_config: Config, tiny_model: Path, language_model: LanguageModel, tmp_path: Path
) -> None:
    config = tiny_config()
    folder = harvest(config, language_model).path
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["complete"] = False
    for key in ("config_sha256", "tokenizer_ids_sha256", "library"):
        del manifest["model"][key]
    del manifest["files"][SHARD]
    (folder / SHARD).unlink()
    write_json(folder / "manifest.json", manifest)
    other = changed_model(tiny_model, tmp_path / "tiny", "config.json", lambda c: c.update(n_head=4))
    with pytest.raises(CacheError, match="differ from those in it"):
        harvest(config, other)
    assert not (folder / SHARD).exists()
    harvest(config, language_model)
    assert (folder / SHARD).exists()
