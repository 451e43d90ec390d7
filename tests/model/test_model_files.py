"""What stands in a model's folder: shards that would be waited for, damaged files, folders that hold no model."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sae.config.sources import ModelConfig
from sae.dictionary.model_identity import fingerprint, has_fingerprint
from sae.errors import ModelError
from sae.files.writing import write_json
from sae.model.language_model import LanguageModel
from sae.runs.run import Run
from tests.conftest import TinyConfig

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tiny_model: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a folder whose index names one shard for all weights."""

    def make(shard: str) -> Path:
        folder = shutil.copytree(tiny_model, tmp_path / "model")
        weights = folder / "model.safetensors"
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), shard)}
        (folder / INDEX).write_text(json.dumps(index))
        (folder / shard).parent.mkdir(exist_ok=True)
        weights.rename(folder / shard)
        return folder

    return make


def error_of(name: Path | str, **settings: str) -> str:
    with pytest.raises(ModelError) as caught:
        LanguageModel(ModelConfig(name=str(name), **settings))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("shard", ["weights-1.safetensors", "sub/weights-1.safetensors"])
def test_shards_are_read_and_their_change_shows(shard: str, sharded: Callable[[str], Path], tiny_model: Path) -> None:
    folder = sharded(shard)
    model = LanguageModel(str(folder))
    assert model.info.weights_sha256 == LanguageModel(str(tiny_model)).info.weights_sha256
    before = fingerprint(str(folder))
    assert before is not None and has_fingerprint(str(folder), before)
    with (folder / shard).open("ab") as file:
        file.write(b" ")
    assert fingerprint(str(folder)) != before
    assert not has_fingerprint(str(folder), before)


def test_what_older_versions_recorded_without_folders_within_counts(sharded: Callable[[str], Path]) -> None:
    folder = sharded("sub/weights-1.safetensors")
    shutil.copyfile(folder / "sub/weights-1.safetensors", folder / "other.safetensors")
    (folder / INDEX).rename(folder / "away")
    older = fingerprint(str(folder))
    (folder / "away").rename(folder / INDEX)
    assert older != fingerprint(str(folder))
    assert has_fingerprint(str(folder), older)


@pytest.mark.parametrize("kind", ["pipe", "socket", "link to a pipe", "link to nothing", "folder", "nothing"])
@pytest.mark.parametrize("shard", ["weights-1.safetensors", "sub/weights-1.safetensors"])
def test_a_shard_that_is_no_file_is_not_waited_for(
    kind: str, shard: str, sharded: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = sharded(shard)
    path = folder / shard
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = Path.cwd()
        os.chdir(path.parent)  # names of sockets are short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
        os.chdir(here)
    elif kind.startswith("link"):
        path.symlink_to(tmp_path / "target")
        if kind == "link to a pipe":
            os.mkfifo(tmp_path / "target")
    elif kind == "folder":
        path.mkdir()
    assert f"{INDEX} names {shard}, which is missing or not a regular file" in error_of(folder)


def test_a_link_to_a_file_is_a_shard(sharded: Callable[[str], Path], tmp_path: Path) -> None:
    """The hub's cache is made of them."""
    folder = sharded("weights-1.safetensors")
    (folder / "weights-1.safetensors").rename(tmp_path / "blob")
    (folder / "weights-1.safetensors").symlink_to(tmp_path / "blob")
    LanguageModel(str(folder))


@pytest.mark.parametrize("shard", ["../outside.safetensors", "sub/../../outside.safetensors", "/outside.safetensors"])
def test_an_index_names_no_file_outside_the_folder(shard: str, sharded: Callable[[str], Path]) -> None:
    folder = sharded("weights-1.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": shard}}))
    assert f"{INDEX} names weights outside the folder, {shard!r}; put the file" in error_of(folder)


def test_what_config_json_names_is_looked_at_too(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "own.safetensors"}))
    os.mkfifo(folder / "own.safetensors")
    assert "config.json names own.safetensors, which is missing or not a regular" in error_of(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (INDEX, "junk", f"{INDEX} is damaged or not JSON"),
        (INDEX, '{"weight_map": []}', f"{INDEX} has no 'weight_map'"),
        (INDEX, '{"weight_map": {"a": "b.safetensors"}}', f"{INDEX} has no 'metadata'"),
        ("tokenizer.json", "{}", "tokenizer.json has no 'model'"),
        ("tokenizer.json", '{"model": {}}', "tokenizer.json has no 'added_tokens'"),
        ("config.json", "{", "config.json is damaged or not JSON"),
        ("config.json", "[]", "config.json holds a list where an object should be"),
        ("tokenizer_config.json", "junk", "tokenizer_config.json is damaged or not JSON"),
    ],
)
def test_a_damaged_file_is_named(name: str, content: str, message: str, sharded: Callable[[str], Path]) -> None:
    folder = sharded("weights-1.safetensors")
    (folder / name).write_text(content)
    error = error_of(folder)
    assert message in error
    assert error.endswith("; download it again from where the model came from")


def test_an_adapter_is_to_be_merged(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "adapter")
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    assert "an adapter without its model" in error_of(folder)
    assert "merge the adapter into its model" in error_of(folder)


def test_an_encoder_decoder_is_not_read(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "t5"}')
    assert "T5Config" in error_of(folder)
    assert "encoder-decoders, and models of images or sound, are not supported" in error_of(folder)


def test_a_file_of_the_folder_is_not_the_model(tiny_model: Path) -> None:
    error = error_of(tiny_model / "config.json")
    assert (
        "neither a folder nor a .gguf file; give the folder of the model's config.json, weights and tokenizer, "
        f"perhaps {str(tiny_model)!r}" in error
    )


@pytest.mark.parametrize("local", [True, False])
def test_a_revision_is_of_the_hub(local: bool, tiny_model: Path) -> None:
    name = str(tiny_model) if local else "demo"
    error = error_of(name, revision="abc")
    assert error == (
        f"model.revision='abc': model {name!r} is a local folder or file, and only hub models have revisions; "
        "leave it out"
    )


def test_a_cache_that_recorded_a_folder_s_revision_is_used(tiny_config: TinyConfig) -> None:
    """As older versions did; it had no effect."""
    config = tiny_config()
    run = Run(config)
    manifest = run.harvest().path / "manifest.json"
    record = json.loads(manifest.read_text())
    record["model"]["requested_revision"] = "main"
    write_json(manifest, record)
    assert Run(config).cache(text=True).manifest.model["requested_revision"] == "main"
