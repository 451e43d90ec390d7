"""A file in; its decompressed bytes out. Damaged files and encodings other than UTF-8 are refused."""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sae.errors import DataError

if TYPE_CHECKING:
    from bz2 import BZ2Decompressor
    from lzma import LZMADecompressor

BYTES_AT_ONCE = 1 << 20
_BLOCK = 4096
_STRAY = 256
"""One NUL in this many bytes is accepted, as other control characters are."""
_MOST_LZMA_MEMORY = 1 << 30


def open_binary(path: Path, packed: str, *, lenient: bool = False) -> io.BufferedIOBase:
    """A file's bytes, decompressed.

    Args:
        path: the file.
        packed: the suffix of its compression, or "".
        lenient: read it as versions 0 to 3 of the reading did: accept NULs, and ignore unreadable data after the first
            stream of a .bz2 or .xz.

    Raises:
        DataError: on opening or reading: NULs as in UTF-16, UTF-32 or data other than text; .zst without pyarrow.
        OSError, EOFError, zlib.error, lzma.LZMAError: on opening or reading: the file is damaged.
    """
    source = _decompressed(path, packed, lenient=lenient)
    return source if lenient else _file_of(_without_nuls(path, source))


def _decompressed(path: Path, packed: str, *, lenient: bool) -> io.BufferedIOBase:
    if packed == ".gz":
        import gzip

        return cast("io.BufferedIOBase", gzip.open(path, "rb"))
    if packed == ".bz2":
        import bz2

        return bz2.open(path, "rb") if lenient else _file_of(_streams(path, bz2.BZ2Decompressor, 1))
    if packed == ".xz":
        import lzma

        decompressor = functools.partial(lzma.LZMADecompressor, memlimit=_MOST_LZMA_MEMORY)
        return lzma.open(path, "rb") if lenient else _file_of(_streams(path, decompressor, 4))
    if packed == ".zst":
        try:
            import pyarrow
        except ImportError as error:
            raise DataError(".zst files need pyarrow, from the package's extra: pip install 'sae[lm]'") from error
        raw = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
        return io.BufferedReader(cast("io.RawIOBase", raw), BYTES_AT_ONCE)
    return path.open("rb")


def _streams(
    path: Path, new: Callable[[], BZ2Decompressor | LZMADecompressor], padding: int
) -> Generator[bytes, None, None]:
    """Consecutive compressed streams, decompressed. Python's own readers take a damaged one for the end.

    Args:
        path: the file.
        new: makes a decompressor for one stream.
        padding: the number of zeros after a stream must be a multiple of this.
    """
    with path.open("rb") as file:
        pieces = iter(functools.partial(file.read, BYTES_AT_ONCE), b"")
        data = next(pieces, b"")
        while True:
            stream = new()
            while not stream.eof:
                if stream.needs_input and not data:
                    raise EOFError("the file ends within a compressed stream")
                yield stream.decompress(data, BYTES_AT_ONCE)
                data = next(pieces, b"") if stream.needs_input else b""
            zeros = 0
            for piece in itertools.chain([stream.unused_data], pieces):
                data = piece.lstrip(b"\0")
                zeros += len(piece) - len(data)
                if data:
                    break
            if zeros % padding:
                raise OSError(f"{zeros} zeros after a compressed stream, not a multiple of {padding}")
            if not data:
                return


def _without_nuls(path: Path, source: io.BufferedIOBase) -> Generator[bytes, None, None]:
    """The content of a file, from `source`.

    Raises:
        DataError: many of its bytes are NULs.
    """
    with source:
        done = 0
        while data := source.read(BYTES_AT_ONCE):
            if b"\0" in data:
                for start in range(0, len(data), _BLOCK):
                    block = data[start : start + _BLOCK]
                    if block.count(0) > max(1, len(block) // _STRAY):
                        raise DataError(_no_text(path, done + start, block))
            yield data
            done += len(data)


def _file_of(pieces: Generator[bytes, None, None]) -> io.BufferedReader:
    return io.BufferedReader(_Pieces(pieces), BYTES_AT_ONCE)


class _Pieces(io.RawIOBase):
    """A file that consists of the pieces that a generator yields; closing it ends the generator."""

    def __init__(self, pieces: Generator[bytes, None, None]) -> None:
        self._pieces, self._rest = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not self._rest:
            self._rest = memoryview(next(filter(None, self._pieces), b""))
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        self._pieces.close()
        super().close()


def _no_text(path: Path, start: int, block: bytes) -> str:
    """The message for NULs in a block of a file: what they mean, and the way out."""
    problem = f"data source {str(path)!r}: NULs from byte {start + block.index(0):,} on"
    encoding = _encoding(block) if start == 0 else None
    if encoding is None:
        share = f"{block.count(0):,} in {len(block):,} bytes"
        return f"{problem}, {share}: this is not text; move the file away, or repair it"
    return f"{problem}: it looks like {encoding}, but only UTF-8 is read; convert it: iconv -f {encoding} -t UTF-8"


def _encoding(block: bytes) -> str | None:
    """The encoding that the NULs in a file's first bytes suggest; None if it is none of UTF-16 and UTF-32."""
    characters = len(block) // 4
    first, second, third, fourth = (block[place::4].count(0) for place in range(4))
    if fourth >= characters > 0 and 2 * third > characters:
        return "UTF-32LE"
    if first >= characters > 0 and 2 * second > characters:
        return "UTF-32BE"
    low, high = first + third, second + fourth
    if high > 9 * low:
        return "UTF-16LE"
    return "UTF-16BE" if low > 9 * high else None
