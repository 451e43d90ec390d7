"""Dequantised copies of GGUF models, so that only the first command on a .gguf file waits for the conversion.

Reading the vocabulary and dequantising the weights of a GGUF takes half a minute for a model of 135M parameters; the
same model as safetensors loads in a second. Copies are kept in Hugging Face's cache (`HF_HOME`), one folder for each
file content and number type, and may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sae.errors import CacheError, DamagedError, UnreadableError
from sae.files.damage import SUMS, damaged
from sae.files.digest import sha256_of
from sae.files.hashes import check
from sae.files.paths import name_of
from sae.files.sums import read_sums, record
from sae.files.writing import free_bytes

_SHARE_OF_FREE_SPACE = 0.1
_LONGEST_STEM = 200
"""Bytes of the GGUF's name in the name of its copy; with the suffix they stay below a file system's limit."""
_REMEDY = "this copy is made again from the GGUF"


def folder_of(path: Path, dtype: str) -> Path | None:
    """The folder for a copy of a GGUF file in a number type; each version of transformers has its own.

    None if the file cannot be read, or the libraries that read it are not installed.
    """
    from huggingface_hub import constants

    try:
        content = " ".join([sha256_of(path), dtype, version("transformers"), version("gguf")])
    except (DamagedError, UnreadableError, PackageNotFoundError):
        return None
    stem = name_of(path.stem).encode()[:_LONGEST_STEM].decode(errors="ignore")
    name = f"{stem}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    return Path(constants.HF_HOME) / "sae-dequantised" / name


def is_whole(folder: Path) -> bool:
    """Whether there is a copy and all of its files are intact; a damaged copy is deleted.

    A copy that cannot be read at the moment counts as missing, and is kept.
    """
    if not folder.is_dir():
        return False
    try:
        if "config.json" not in (names := read_sums(folder)):
            raise damaged(folder / SUMS, "missing or without config.json", _REMEDY)
        for name in names:
            check(folder / name, remedy=_REMEDY)
    except (DamagedError, UnreadableError) as error:
        warnings.warn(str(error), stacklevel=2)
        if isinstance(error, DamagedError):
            shutil.rmtree(folder, ignore_errors=True)
        return False
    return True


def write(folder: Path, model: Any, tokenizer: Any) -> None:
    """Save a model that came from a GGUF file if it takes at most a tenth of the free disk space."""
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    with contextlib.suppress(OSError, CacheError):  # no place to write, or another process was faster
        if size > _SHARE_OF_FREE_SPACE * free_bytes(folder):
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as name:
            copy = Path(name) / "copy"
            model.hf_quantizer = None  # its weights are plain numbers by now
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(copy)
            tokenizer.save_pretrained(copy)
            for path in copy.iterdir():
                record(path)
            copy.rename(folder)
