"""Which model it is: a name that survives moving, quick fingerprints of files, hashes of weights and tokenizers."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.paths import expanded

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent / "demo"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")


def model_label(name: str) -> str:
    """What a model is known by: hub names as they are, of paths the last part, so that a folder can be moved."""
    path = expanded(name)
    is_path = path.exists() or name.startswith((".", "/", "~")) or name.endswith(".gguf")
    return path.resolve().name if is_path and name != DEMO else name


def fingerprint(name: str) -> str | None:
    """A quick hash of a local model's weight files, from their sizes and samples all over them: a swap shows
    without loading anything.

    None for hub models.
    """
    path = DEMO_FOLDER if name == DEMO else expanded(name)
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.suffix in _WEIGHT_SUFFIXES)
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{size} ".encode())
        with file.open("rb") as content:
            for place in range(0, size, max(size // 64, 1 << 16)):
                content.seek(place)
                digest.update(content.read(1 << 12))
    return digest.hexdigest()


def hash_weights(model: Any) -> str:
    """One digest over all weights, name by name; tensors are hashed side by side."""
    tensors = sorted(model.state_dict().items())

    def digest(item: tuple[str, Tensor]) -> bytes:
        name, tensor = item
        content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return (
            hashlib.sha256(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode()).digest()
            + hashlib.sha256(content).digest()
        )

    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(digest, tensors))).hexdigest()


def hash_tokenizer(tokenizer: Any) -> str:
    """One digest over vocabulary and special tokens."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr((vocabulary, sorted(tokenizer.all_special_ids))).encode()).hexdigest()
