"""A set of hashes in 16 bytes each: which documents have been read."""

from __future__ import annotations

import numpy as np

from sae.text.document import Chat, LongText, TokenIds, digest_of

_RECENT = 1 << 16


class DigestSet:
    """Hashes of 16 bytes, sorted in one array but for the newest, which are merged into it as they become many."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, dtype="S16")
        self._recent: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def __contains__(self, digest: bytes) -> bool:
        if digest in self._recent:
            return True
        place = int(np.searchsorted(self._sorted, np.bytes_(digest)))
        return place < len(self._sorted) and bool(self._sorted[place] == np.bytes_(digest))

    def add(self, digest: bytes) -> bool:
        """Whether it was not there; now it is."""
        if digest in self:
            return False
        self._recent.add(digest)
        if len(self._recent) > max(_RECENT, len(self._sorted) // 8):
            self._sorted = np.concatenate([self._sorted, np.array(list(self._recent), dtype="S16")])
            self._sorted.sort()
            self._recent = set()
        return True


class ReadTexts:
    """Which contents have been read. Of long texts the beginnings; all of one only where two begin alike."""

    def __init__(self) -> None:
        self._digests = DigestSet()
        self._long: dict[bytes, list[LongText]] = {}

    def add(self, content: str | LongText | TokenIds | Chat) -> bool:
        """Whether it had not been read; from now on it has."""
        if not isinstance(content, LongText):
            return self._digests.add(digest_of(content))
        alike = self._long.setdefault(digest_of(content.beginning), [])
        if any(content.place is not None and content.place == other.place for other in alike):
            return False
        if alike and content.digest in {other.digest for other in alike}:
            return False
        alike.append(content)
        return True
