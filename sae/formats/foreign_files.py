"""Files of other toolkits, read within limits and written: pickles of plain tensors only, arrays never of objects."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae.config.yaml_text import parsed
from sae.dictionary.base import dtype_name
from sae.errors import DamagedError, FormatError
from sae.files.damage import SUMS, damaged, unreadable
from sae.files.digest import open_regular, read_whole
from sae.files.hashes import check, read_checked
from sae.files.printable import one_line
from sae.files.reading import as_object, is_pickle, parse_json
from sae.files.sums import HEADER
from sae.files.writing import write_bytes, write_json, write_tensors

REMEDY = "get the file again from where it was published"
_CHANGED = f"{REMEDY}, or delete {SUMS} if it was changed on purpose"
_MOST_SETTINGS = 1 << 24
_LONGEST = 200
_INFLATION = 100
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NOT_THE_FILE = (MemoryError, torch.OutOfMemoryError)


def folder_with(path: Path, settings: str, weights: str) -> Path | None:
    """The folder that holds both files: the path, or that of the file if it is one of them; None if it lacks one."""
    folder = path.parent if path.name in (settings, weights) else path
    return folder if (folder / settings).is_file() and (folder / weights).is_file() else None


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings of a dictionary, in JSON or YAML.

    Raises:
        DamagedError: the file is missing, larger than 16 MiB, differs from the hash that this toolkit recorded for it,
            or does not hold keys and values.
        UnreadableError: the machine cannot read it.
    """
    if _is_ours(path):
        content = read_checked(path, most=_MOST_SETTINGS, remedy=_CHANGED, announce=False)
    else:
        content = read_whole(path, _MOST_SETTINGS, REMEDY)
    if path.suffix == ".json":
        return as_object(path, parse_json(path, content, REMEDY), REMEDY)
    try:
        settings = as_object(path, parsed(content.decode("utf-8")), REMEDY)
        json.dumps(settings)
        return settings
    except TypeError as error:
        raise damaged(path, f"holds more than numbers and text ({one_line(str(error), _LONGEST)})", REMEDY) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise damaged(path, f"not YAML ({one_line(str(error), _LONGEST)})", REMEDY) from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        DamagedError: the file is missing, or not a safetensors file.
        UnreadableError: the machine cannot read it.
    """
    if is_pickle(path):
        raise damaged(path, "a pickle, not a safetensors file", REMEDY)
    return _read(path, load_file)


def read_pickle(path: Path) -> dict[str, Any]:
    """Read a file that `torch.save` wrote, if it holds nothing but tensors, numbers and text by name. No code is run.

    Raises:
        DamagedError: the file is missing, damaged, or holds other objects.
        UnreadableError: the machine cannot read it.
    """
    loaded = _read(path, _unpickled)
    if not isinstance(loaded, Mapping):
        raise damaged(path, f"holds a {type(loaded).__name__} instead of tensors by name", REMEDY)
    return {str(name): value for name, value in loaded.items()}


def _unpickled(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            _check_inflation(archive)
    return torch.load(path, map_location="cpu", weights_only=True)


def _check_inflation(archive: zipfile.ZipFile) -> None:
    """Refuse a small archive that would fill the memory: weights hardly get smaller when they are compressed."""
    for entry in archive.infolist():
        if entry.file_size > _INFLATION * entry.compress_size + _MOST_SETTINGS:
            raise ValueError(f"{entry.filename}: {entry.compress_size:,} bytes would become {entry.file_size:,}")


def read_npz(path: Path) -> dict[str, Tensor]:
    """Read all arrays of an .npz file.

    Raises:
        DamagedError: the file is missing, damaged, or holds Python objects.
        UnreadableError: the machine cannot read it.
    """
    return _read(path, _arrays)


def _arrays(path: Path) -> dict[str, Tensor]:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        _check_inflation(archive)
        for entry in archive.infolist():
            with archive.open(entry) as file:
                start = io.BytesIO(file.read(1 << 16))  # the size that the head states is checked before memory is used
            version = np.lib.format.read_magic(start)
            read_head = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read_head(start)
            if start.tell() + int(np.prod(shape, dtype=object)) * dtype.itemsize != entry.file_size:
                raise ValueError(f"{entry.filename}: its shape {list(shape)} does not fit {entry.file_size:,} bytes")
    with np.load(path, allow_pickle=False) as loaded:
        for name in loaded.files:
            arrays[name] = torch.from_numpy(np.ascontiguousarray(loaded[name]))
    return arrays


def _read(path: Path, reader: Callable[[Path], Any]) -> Any:
    """The result of reading a regular file; whatever a library raises for its content becomes one line.

    If this toolkit wrote it, it is compared with its hash.
    """
    os.close(open_regular(path, REMEDY))
    if _is_ours(path):
        check(path, remedy=_CHANGED, announce=False)
    try:
        return reader(path)
    except _NOT_THE_FILE:
        raise
    except OSError as error:
        raise unreadable(path, error, REMEDY) from error
    except pickle.UnpicklingError as error:
        raise damaged(
            path, "a pickle that is damaged, or holds more than tensors, numbers and text, which could run code", REMEDY
        ) from error
    except (SafetensorError, Exception) as error:
        raise damaged(path, f"damaged ({one_line(str(error), _LONGEST) or type(error).__name__})", REMEDY) from error


def _is_ours(path: Path) -> bool:
    """Whether this toolkit recorded hashes next to a file; lists of others are not read."""
    try:
        with (path.parent / SUMS).open("rb") as file:
            return file.read(len(HEADER)) == HEADER.encode()
    except OSError:
        return False


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a dictionary in JSON.

    Raises:
        CacheError: the folder cannot be written.
    """
    write_json(path, dict(settings))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name, in any layout and on any device, as safetensors.

    Raises:
        CacheError: the folder cannot be written.
    """
    write_tensors(path, {name: _plain(tensor) for name, tensor in tensors.items()})


def write_pickle(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors, numbers and text by name as `torch.save` does.

    Raises:
        CacheError: the folder cannot be written.
    """
    file = io.BytesIO()
    plain = {name: _plain(value) if isinstance(value, Tensor) else value for name, value in content.items()}
    torch.save(plain, file)
    write_bytes(path, file.getvalue())


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


class Tensors:
    """The tensors of a dictionary in a file, each taken by name and shape.

    Args:
        path: the file, for errors.
        tensors: what it holds.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Any]) -> None:
        self.path, self._left = path, dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, *shape: int | None) -> Tensor:
        """The tensor with this name, which is then no longer there.

        Args:
            name: its name.
            shape: its shape; None for any length.

        Raises:
            DamagedError: there is none, it has another shape, or its numbers are not finite floating-point numbers.
        """
        tensor = self._left.pop(name, None)
        if not isinstance(tensor, Tensor):
            names = ", ".join(sorted(map(str, self._left))[:12]) or "nothing"
            raise self.error(f"has no tensor {name!r}, but {one_line(names, _LONGEST)}")
        if tensor.is_nested or tensor.layout != torch.strided or tensor.dtype not in _FLOATS:
            raise self.error(f"{name} holds {dtype_name(tensor.dtype)} numbers instead of floating-point")
        if len(shape) != tensor.ndim or any(
            expected not in (None, actual) for expected, actual in zip(shape, tensor.shape, strict=True)
        ):
            expected = ", ".join("any" if length is None else str(length) for length in shape)
            raise self.error(f"{name} has the shape {list(tensor.shape)} instead of [{expected}]")
        if tensor.is_meta or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise self.error(f"{name} has the shape {list(tensor.shape)}, and fewer numbers than that")
        if tensor.numel() == 0 or not bool(tensor.isfinite().all()):
            raise self.error(f"{name} has no numbers, or some that are not finite")
        return tensor

    def number(self, name: str) -> int:
        """The whole number with this name, which is then no longer there.

        Raises:
            DamagedError: there is none.
        """
        value = self._left.pop(name, None)
        if isinstance(value, Tensor) and not value.is_meta and value.dtype in (torch.int32, torch.int64):
            value = int(value) if value.numel() == 1 else None
        if type(value) is not int:
            raise self.error(f"has no whole number {name!r}")
        return value

    def drop(self, *names: str) -> None:
        """Leave tensors out that have no part in a reconstruction."""
        for name in names:
            self._left.pop(name, None)

    def end(self) -> None:
        """Check that nothing is left.

        Raises:
            FormatError: there are tensors whose meaning is unknown.
        """
        if self._left:
            names = one_line(", ".join(sorted(self._left)[:12]), _LONGEST)
            raise FormatError(f"{str(self.path)!r}: holds {names}, whose meaning is unknown, so it cannot be read")

    def error(self, reason: str) -> DamagedError:
        """The error for content that does not fit."""
        return damaged(self.path, reason, REMEDY)
