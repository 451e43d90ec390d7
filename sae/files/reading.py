"""Reading of files that the toolkit wrote: compared with their hash first, then parsed within limits."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from sae.errors import DamagedError, UnreadableError
from sae.files.damage import damaged, unreadable
from sae.files.digest import identity_of, open_regular
from sae.files.hashes import check, read_checked
from sae.files.printable import one_line

MOST_JSON_BYTES = 1 << 30
_A_PICKLE = "a pickle, not a safetensors file"
_LARGEST_INTEGER = 1 << 64
_LONGEST = 200
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Number types of weights, by their names in safetensors files."""
_WRONG = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError, RecursionError)

Parsed = TypeVar("Parsed")


def read_json(path: Path, expected: str | None = None, *, remedy: str | None = None) -> Any:
    """Read a JSON file that the toolkit wrote.

    Args:
        path: the file.
        expected: its SHA-256, if that is not in `SHA256SUMS` next to it.
        remedy: what to do if it is damaged; by default depends on its name.

    Raises:
        DamagedError: the file is missing, differs from its hash, or is not JSON as this toolkit writes it: not UTF-8, a
            repeated key, a number of more than 64 bits, too deep.
    """
    return parse_json(path, read_checked(path, expected, most=MOST_JSON_BYTES, remedy=remedy), remedy)


def parse_json(path: Path, content: bytes, remedy: str | None = None) -> Any:
    """As `read_json`, for content that was read already.

    Raises:
        DamagedError: the content is not JSON as this toolkit writes it.
    """
    try:
        parsed = json.loads(content.decode("utf-8"), parse_int=_integer, object_pairs_hook=_each_key_once)
        if b"\\ud" in content or b"\\uD" in content:
            json.dumps(parsed, ensure_ascii=False).encode()  # refuses half a surrogate pair
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"damaged ({_short(error)})", remedy) from error
    return parsed


def read_object(path: Path, expected: str | None = None, *, remedy: str | None = None) -> dict[str, Any]:
    """As `read_json`, for a file that holds keys and values.

    Raises:
        DamagedError: as `read_json`; or the file holds something else.
    """
    return as_object(path, read_json(path, expected, remedy=remedy), remedy)


def as_object(path: Path, parsed: Any, remedy: str | None = None) -> dict[str, Any]:
    """Return parsed JSON if it has keys and values.

    Raises:
        DamagedError: it has none.
    """
    if not isinstance(parsed, dict):
        raise damaged(path, "damaged (expected keys and values)", remedy)
    return parsed


def validated(path: Path, kind: type[Parsed] | Any, record: Any, remedy: str | None = None) -> Any:
    """Validate a record, and convert it to a type.

    Args:
        path: the file that it was read from.
        kind: a pydantic model or any type that pydantic checks.
        record: parsed JSON.
        remedy: what to do if the file is damaged; by default depends on its name.

    Raises:
        DamagedError: a value is missing or of another type; the message names the first.
    """
    try:
        return TypeAdapter(kind).validate_python(record)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "content"
        raise damaged(
            path, f"damaged ({one_line(where, _LONGEST)}: {one_line(first['msg'], _LONGEST)})", remedy
        ) from error
    except RecursionError as error:
        raise damaged(path, "damaged (too deep)", remedy) from error


def conforming(parsed: Parsed) -> Parsed:
    """Return a dataclass made from a record if all its fields have their declared types.

    Raises:
        ValueError: a field has another type.
    """
    try:
        TypeAdapter(type(parsed)).validate_python(dataclasses.asdict(parsed))  # pyright: ignore[reportArgumentType]
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return parsed


@contextlib.contextmanager
def taken_apart(path: Path, remedy: str | None = None) -> Iterator[None]:
    """Context in which a record read from `path` is converted to objects; errors mean that the file is damaged.

    Raises:
        DamagedError: the body found a missing key, another type, or a value out of range.
    """
    try:
        yield
    except torch.OutOfMemoryError:  # the machine's fault, not the file's
        raise
    except _WRONG as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise damaged(path, f"damaged ({one_line(reason, _LONGEST)})", remedy) from error


def load_tensors(
    path: Path, device: str | torch.device = "cpu", expected: str | None = None, *, remedy: str | None = None
) -> dict[str, Tensor]:
    """Load all tensors of a safetensors file that the toolkit wrote.

    Raises:
        DamagedError: the file is missing, differs from its hash, or is not a safetensors file.
        UnreadableError: the machine cannot read it.
    """
    tensors = _opened(path, load_file, expected, remedy)
    return {name: tensor.to(device) for name, tensor in tensors.items()}  # out of memory here is not the file's fault


def open_tensors(path: Path, expected: str | None = None, *, remedy: str | None = None) -> Any:
    """Open a safetensors file that the toolkit wrote with `safetensors.safe_open`, mapped into memory.

    Raises:
        DamagedError: the file is missing, differs from its hash, or is not a safetensors file.
        UnreadableError: the machine cannot read it.
    """
    return _opened(path, functools.partial(safe_open, framework="pt"), expected, remedy)


def tensor_of(file: Any, name: str, path: Path, remedy: str | None = None) -> Tensor:
    """A tensor of a file that `open_tensors` opened.

    Raises:
        DamagedError: there is no tensor with this name.
    """
    try:
        return file.get_tensor(name)
    except OSError as error:
        raise unreadable(path, error, remedy) from error
    except (SafetensorError, ValueError) as error:
        raise damaged(path, f"damaged ({_short(error)})", remedy) from error


def tensor_start(file: BinaryIO, name: str, path: Path, remedy: str | None = None) -> int:
    """The byte of a safetensors file at which a tensor begins.

    Args:
        file: the open file, whose content was checked.
        name: the tensor.
        path: where it lies, for errors.
        remedy: what to do if it is damaged; by default depends on its name.

    Raises:
        DamagedError: there is no tensor with this name.
    """
    header, start = _header(file, path, remedy)
    with taken_apart(path, remedy):
        return start + header[name]["data_offsets"][0]


def tensor_outlines(path: Path, *, remedy: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the device `meta`: their shapes and number types, without their values.

    Only the header is read. The file is not compared with its hash, but must be as long as the header says.

    Raises:
        DamagedError: the file is missing, or its header is not that of a safetensors file of numbers.
        UnreadableError: the machine cannot read it.
    """
    with os.fdopen(open_regular(path, remedy), "rb") as file:
        try:
            header, start = _header(file, path, remedy)
            size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise unreadable(path, error, remedy) from error
        except DamagedError as error:
            if is_pickle(path):
                raise damaged(path, _A_PICKLE, remedy) from error
            raise
    with taken_apart(path, remedy):
        tensors = {
            name: torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="meta")
            for name, entry in header.items()
            if name != "__metadata__"
        }
        end = max((header[name]["data_offsets"][1] for name in tensors), default=0)
        if size != start + end or end != sum(tensor.nbytes for tensor in tensors.values()):
            raise ValueError(f"{size:,} bytes, where its header says {start + end:,}")
    return tensors


def _header(file: BinaryIO, path: Path, remedy: str | None) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the byte after it."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > MOST_JSON_BYTES:
        raise damaged(path, f"damaged (a header of {length:,} bytes)", remedy)
    return as_object(path, parse_json(path, file.read(length), remedy), remedy), 8 + length


def _opened(path: Path, opener: Callable[[Path], Parsed], expected: str | None, remedy: str | None) -> Parsed:
    """Compare a safetensors file with its hash, and open this same file with `opener`."""
    try:
        identity = check(path, expected, remedy=remedy)
    except DamagedError as error:
        if is_pickle(path):
            raise damaged(path, _A_PICKLE, remedy) from error
        raise
    try:
        str(path).encode()
        opened = opener(path)
        same = identity_of(path.stat()) == identity
    except UnicodeEncodeError as error:
        raise UnreadableError(
            f"{str(path)!r}: the path is not UTF-8, and safetensors opens no other; rename the folder"
        ) from error
    except OSError as error:
        os.close(open_regular(path, remedy))  # its error is more precise than that of safetensors
        raise unreadable(path, error, remedy) from error
    except (SafetensorError, ValueError) as error:
        kind = _A_PICKLE if is_pickle(path) else f"damaged ({_short(error)})"
        raise damaged(path, kind, remedy) from error
    if not same:
        raise damaged(path, "changed while it was opened; wait for the process that writes it", remedy)
    return opened


def is_pickle(path: Path) -> bool:
    """Whether a file begins like a pickle or a PyTorch archive of pickles."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            start = file.read(4)
    except (OSError, DamagedError, UnreadableError):
        return False
    return start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or start == b"PK\x03\x04"


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {twice!r} is repeated")
    return parsed


def _integer(text: str) -> int:
    if len(text) > 21 or not -_LARGEST_INTEGER <= int(text) < _LARGEST_INTEGER:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _short(error: BaseException) -> str:
    return "too deep" if isinstance(error, RecursionError) else one_line(str(error), _LONGEST)
