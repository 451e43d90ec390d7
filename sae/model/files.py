"""Checks the files of a local model before a library opens them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae.errors import ModelError
from sae.files.paths import expanded

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
INDEX = "model.safetensors.index.json"
_OPENED = (
    "config", "generation_config", "model", "tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges",
    "chat_template",
)  # fmt: skip
"""Prefixes of the names of files that transformers opens in a model's folder."""
_JSON = {
    "config.json": ("model_type",),
    "tokenizer_config.json": (),
    "generation_config.json": (),
    "tokenizer.json": ("model", "added_tokens"),
}
"""Files that hold a JSON object, and the entries that each needs."""
_FETCH = "download it again from where the model came from"


def check_folder(name: str, folder: Path) -> None:
    """Check a model's folder before a library opens a file in it, which might block for ever.

    Args:
        name: the model, as the user gave it.
        folder: the model's folder.

    Raises:
        ModelError: the folder is an adapter's; a pipe, a device or a broken link is in the place of a file; the index
            of the weights is damaged, or names a file that is missing or outside the folder; or the weights are a
            pickle.
    """
    for path in sorted(folder.iterdir()):
        if path.name.startswith(_OPENED) and not path.is_file() and not path.is_dir():
            raise ModelError(_no_file(name, path.name))
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").exists():
        raise ModelError(
            f"model {name!r}: an adapter without its model: the folder has adapter_config.json and no config.json; "
            "merge the adapter into its model, save that (in PEFT: model.merge_and_unload().save_pretrained(...), and "
            "the tokenizer with it), and give that folder"
        )
    config = folder / "config.json"
    weights = _read_json(config if config.is_file() else None).get("transformers_weights")
    if isinstance(weights, str):
        if weights.endswith(".safetensors"):
            _check_shard(name, folder, weights, "config.json")
        elif weights.endswith(".safetensors.index.json"):
            _check_index(name, folder, weights)
    elif not (folder / "model.safetensors").is_file() and (folder / INDEX).is_file():
        _check_index(name, folder, INDEX)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES and path.is_file())
    if pickles and not any(path.is_file() for path in folder.glob("*.safetensors*")):
        raise ModelError(f"model {name!r}: {weights_are(name, pickles[0])}")


def weights_are(name: str, pickle: str) -> str:
    """What to do about weights that are not safetensors.

    Args:
        name: the model, as the user gave it.
        pickle: what its weights are instead.
    """
    source = str(expanded(name)) if expanded(name).exists() else name
    target = f"{Path(source).name}-safetensors"
    return (
        f"its weights are {pickle}, and only safetensors and GGUF are read, since a pickle can run code; if you trust "
        f'it, convert it once: python -c "import transformers as t; [c.from_pretrained({source!r}).save_pretrained('
        f'{target!r}) for c in (t.AutoModelForCausalLM, t.AutoTokenizer)]", then model.name=./{target}'
    )


def damaged_file(folder: Path) -> str | None:
    """The damaged file that keeps a model from loading, and what is wrong with it; None if none is found."""
    if not (folder / "config.json").exists():
        if ggufs := sorted(folder.glob("*.gguf")):
            return f"give the file: model.name={ggufs[0]}"
        return "the folder has no config.json; give the folder that the model's configuration and weights are in"
    return next((f"{fault}; {_FETCH}" for name, keys in _JSON.items() if (fault := _fault(folder / name, keys))), None)


def _fault(path: Path, keys: tuple[str, ...]) -> str | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        return f"{path.name} is damaged or not JSON ({error})"
    if not isinstance(content, dict):
        return f"{path.name} holds a {type(content).__name__} where an object should be"
    missing_key = next((key for key in keys if key not in content), None)
    return None if missing_key is None else f"{path.name} has no {missing_key!r}"


def added_tokens(read: Callable[[str], Path | None]) -> set[str]:
    """Tokens that a tokenizer's files add to its vocabulary, including special tokens.

    Args:
        read: returns the path of a file by its name, or None if there is no such file.
    """
    listed = _read_json(read("tokenizer.json")).get("added_tokens") or []
    decoder = _read_json(read("tokenizer_config.json")).get("added_tokens_decoder") or {}
    entries = [*listed, *(decoder.values() if isinstance(decoder, dict) else ())]
    return {str(entry["content"]) for entry in entries if isinstance(entry, dict) and "content" in entry} | {
        str(token) for token in _read_json(read("added_tokens.json"))
    }


def _check_index(name: str, folder: Path, index: str) -> None:
    path = folder / index
    if not path.is_file():
        raise ModelError(_no_file(name, index))
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"model {name!r}: {index} is damaged or not JSON ({error}); {_FETCH}") from error
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ModelError(f"model {name!r}: {index} has no 'weight_map' from tensors to files; {_FETCH}")
    if not isinstance(content.get("metadata"), dict):
        raise ModelError(f"model {name!r}: {index} has no 'metadata'; {_FETCH}")
    for shard in sorted(set(shards.values())):
        _check_shard(name, path.parent, shard, index)


def _check_shard(name: str, folder: Path, shard: str, by: str) -> None:
    """A link to a regular file counts as one: the hub's cache consists of links."""
    if Path(os.path.normpath(shard)).is_absolute() or os.path.normpath(shard).startswith(".."):
        raise ModelError(
            f"model {name!r}: {by} names weights outside the folder, {shard!r}; put the file into the folder and name "
            "it there"
        )
    if not shard.endswith(".safetensors"):
        raise ModelError(f"model {name!r}: {weights_are(name, f'{shard}, which {by} names')}")
    if not (folder / shard).is_file():
        raise ModelError(
            f"model {name!r}: {by} names {shard}, which is missing or not a regular file (a folder, a pipe, a device "
            f"or a broken link); {_FETCH}"
        )


def _no_file(name: str, file: str) -> str:
    return (
        f"model {name!r}: {file} is a pipe, a device or a broken link where a file should be; put the file there, "
        "or remove it"
    )


def _read_json(path: Path | None) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing, damaged or holds no object."""
    try:
        content = {} if path is None else json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
