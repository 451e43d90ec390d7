"""Identity of a model: a name that survives moving, quick fingerprints of files, hashes of weights and tokenizers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.files.digest import sha256_of
from sae.files.paths import expanded

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parents[1] / "demo"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")
_INDEX = "model.safetensors.index.json"
_WHOLE_BYTES = 256_000_000
NOT_OF_ACTIVATIONS = ("name", "fingerprint", "library", "reader")
"""Entries that may differ between models with equal activations."""
_NOT_COMPUTED = {
    "_name_or_path", "_commit_hash", "transformers_version", "architectures", "auto_map", "model_type", "dtype",
    "torch_dtype", "quantization_config", "attn_implementation", "_attn_implementation", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "decoder_start_token_id", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params",
}  # fmt: skip
"""Entries of a model's configuration that its activations do not depend on."""
_PROBE_TEXT = """\
The quick brown fox jumps over the lazy dog, again and again; nobody knows why it wouldn't stop. In 1984 (or was it
2001?) she'd paid $3.50 for 12,345 apples & pears -- "too much!", he said. Understanding representations requires
interpretable, sparse, overcomplete dictionaries: superposition isn't unavoidable.

def harvest(model, tokens: list[int], *, batch_size=64) -> dict[str, "Tensor"]:
\t# returns {name: activations}; raises ValueError if len(tokens) != 128
    for i, token in enumerate(tokens):
        if token is None or not (0 <= token < 50_257): continue
        self.cache[f"{i:05d}"] = model.forward(token)['hidden'] ** 2 + 1e-06
    return   self.cache

Größe, naïve café, señor, Москва, 東京タワー, 한국어, العربية, ∑ᵢ xᵢ² ≤ π/2, 😀👍🏽 https://example.org/a?b=c%20d#e
"""


def model_label(name: str) -> str:
    """A model's label: its hub name, or the last part of its path, so that a folder can be moved."""
    path = expanded(name)
    is_path = path.exists() or name.startswith((".", "/", "~")) or name.endswith(".gguf")
    return path.resolve().name if is_path and name != DEMO else name


def fingerprint(name: str) -> str | None:
    """A quick hash of a local model's weight files, which detects a swap without loading anything.

    Up to 256 MB, all bytes are hashed; above, the sizes and samples spread over the files. None for hub models.
    """
    files = _weight_files(name)
    if not files:
        return None
    return _hash_contents(files)


def has_fingerprint(name: str, recorded: str | None) -> bool | None:
    """Whether a recorded fingerprint matches a local model's weight files; None if one of the two is unknown.

    Fingerprints of older versions hash samples, whatever the size, and only files directly in the folder.
    """
    files = _weight_files(name)
    if not files or recorded is None:
        return None
    older = _weight_files(name, subfolders=False)
    return recorded in (fingerprint(name), _hash_samples(files)) or bool(
        older and older != files and recorded in (_hash_contents(older), _hash_samples(older))
    )


def _weight_files(name: str, *, subfolders: bool = True) -> list[Path]:
    """Weight files of a local model: regular files, or links to such.

    Args:
        name: the model.
        subfolders: include files in subfolders if the model's index names them.
    """
    path = DEMO_FOLDER if name == DEMO else expanded(name)
    if path.is_file():
        return [path]
    own = [file for file in path.glob("*") if file.suffix in _WEIGHT_SUFFIXES and file.is_file()]
    shards = [path / shard for shard in _shards(path / _INDEX) if "/" in shard] if subfolders else []
    return sorted({*own, *(file for file in shards if file.suffix in _WEIGHT_SUFFIXES and file.is_file())})


def _shards(index: Path) -> set[str]:
    """Files that an index of weights names; empty if there is no readable index."""
    try:
        shards = json.loads(index.read_bytes())["weight_map"].values() if index.is_file() else ()
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return set()
    return {shard for shard in shards if isinstance(shard, str) and ".." not in Path(shard).parts}


def _hash_contents(files: list[Path]) -> str:
    if sum(file.stat().st_size for file in files) > _WHOLE_BYTES:
        return _hash_samples(files)
    return hashlib.sha256("".join(sha256_of(file) for file in files).encode()).hexdigest()


def _hash_samples(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{size} ".encode())
        with file.open("rb") as content:
            for offset in range(0, size, max(size // 64, 1 << 16)):
                content.seek(offset)
                digest.update(content.read(1 << 12))
    return digest.hexdigest()


def hash_weights(model: Any, dtype: torch.dtype | None = None) -> str:
    """One digest over all weights, in order of their names; tensors are hashed in parallel.

    Args:
        model: a module.
        dtype: number type in which floating-point weights are hashed; None: their own.
    """
    tensors = sorted(model.state_dict().items())

    def digest(item: tuple[str, Tensor]) -> bytes:
        name, tensor = item
        tensor = tensor.detach().cpu()
        tensor = tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
        content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return (
            hashlib.sha256(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode()).digest()
            + hashlib.sha256(content).digest()
        )

    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(digest, tensors))).hexdigest()


def hash_config(config: Any) -> str:
    """A hash of the entries in a model's configuration that affect its computation.

    Entries at the library's defaults do not count, so the hash may differ between versions of the library.
    """

    def relevant(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): relevant(part) for key, part in value.items() if key not in _NOT_COMPUTED}
        return [relevant(part) for part in value] if isinstance(value, list | tuple) else value

    content = json.dumps(relevant(config.to_diff_dict()), sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def differs(key: str, recorded: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Whether two records of models contradict each other in an entry that both have.

    Hashes of configurations can be compared only if the same version of the library made both.
    """
    if None in (recorded.get(key), here.get(key)):
        return False
    comparable = key != "config_sha256" or recorded.get("library") == here.get("library")
    return comparable and recorded[key] != here[key]


def hash_ids(tokenizer: Any) -> str:
    """A hash of the ids that a tokenizer gives for a varied text; it identifies the rules, not the vocabulary."""
    ids = tokenizer(_PROBE_TEXT, add_special_tokens=False, verbose=False)["input_ids"]
    return hashlib.sha256(json.dumps(list(map(int, ids))).encode()).hexdigest()


def hash_tokenizer(tokenizer: Any) -> str:
    """One digest over vocabulary and special tokens."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr((vocabulary, sorted(tokenizer.all_special_ids))).encode()).hexdigest()
