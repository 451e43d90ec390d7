"""A file in; its decompressed bytes out. Damaged files and encodings other than UTF-8 are refused."""

from __future__ import annotations

import io
from collections.abc import Callable
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
_Buffer = bytearray | memoryview


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
    return source if lenient else io.BufferedReader(_WithoutNuls(path, source), BYTES_AT_ONCE)


def _decompressed(path: Path, packed: str, *, lenient: bool) -> io.BufferedIOBase:
    if packed == ".gz":
        import gzip

        return cast("io.BufferedIOBase", gzip.open(path, "rb"))
    if packed == ".bz2":
        import bz2

        return bz2.open(path, "rb") if lenient else _streams(path, bz2.BZ2Decompressor, 1)
    if packed == ".xz":
        import lzma

        def decompressor() -> LZMADecompressor:
            return lzma.LZMADecompressor(memlimit=_MOST_LZMA_MEMORY)

        return lzma.open(path, "rb") if lenient else _streams(path, decompressor, 4)
    if packed == ".zst":
        try:
            import pyarrow
        except ImportError as error:
            raise DataError(".zst files need pyarrow, from the package's extra: pip install 'sae[lm]'") from error
        raw = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
        return io.BufferedReader(cast("io.RawIOBase", raw), BYTES_AT_ONCE)
    return path.open("rb")


def _streams(path: Path, new: Callable[[], BZ2Decompressor | LZMADecompressor], padding: int) -> io.BufferedReader:
    return io.BufferedReader(_Streams(path, new, padding), BYTES_AT_ONCE)


class _Streams(io.RawIOBase):
    """Consecutive compressed streams, decompressed. Python's own readers take a damaged one for the end.

    Args:
        path: the file.
        new: makes a decompressor for one stream.
        padding: the number of zeros after a stream must be a multiple of this.
    """

    def __init__(self, path: Path, new: Callable[[], BZ2Decompressor | LZMADecompressor], padding: int) -> None:
        self._file, self._new, self._padding = path.open("rb"), new, padding
        self._stream, self._waiting = new(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: _Buffer, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        while not self._stream.eof or self._begin_next():
            data = b""
            if self._stream.needs_input:
                data, self._waiting = self._waiting or self._file.read(BYTES_AT_ONCE), b""
                if not data:
                    raise EOFError("the file ends within a compressed stream")
            output = self._stream.decompress(data, len(buffer))
            if output:
                buffer[: len(output)] = output
                return len(output)
        return 0

    def _begin_next(self) -> bool:
        """Begin the next stream; False if only zeros follow."""
        data, zeros = self._stream.unused_data, 0
        while data:
            rest = data.lstrip(b"\0")
            zeros += len(data) - len(rest)
            if rest:
                break
            data = self._file.read(BYTES_AT_ONCE)
        else:
            rest = b""
        if zeros % self._padding:
            raise OSError(f"{zeros} zeros after a compressed stream, not a multiple of {self._padding}")
        if rest:
            self._stream, self._waiting = self._new(), rest
        return bool(rest)

    def close(self) -> None:
        self._file.close()
        super().close()


class _WithoutNuls(io.RawIOBase):
    """A file's bytes; reading raises DataError if many of them are NULs."""

    def __init__(self, path: Path, source: io.BufferedIOBase) -> None:
        self._path, self._source, self._done = path, source, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: _Buffer, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        data = self._source.read(len(buffer))
        if b"\0" in data:
            for start in range(0, len(data), _BLOCK):
                block = data[start : start + _BLOCK]
                if block.count(0) > max(1, len(block) // _STRAY):
                    raise DataError(_no_text(self._path, self._done + start, block))
        buffer[: len(data)] = data
        self._done += len(data)
        return len(data)

    def close(self) -> None:
        self._source.close()
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
