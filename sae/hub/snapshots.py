"""A dictionary in the hub's cache: which repository and commit it is from, and what its release knows of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sae.dictionary.published import PUBLISHED
from sae.files.damage import damaged
from sae.files.digest import read_whole, sha256_of
from sae.hub.releases import REGISTRY, RELEASES, release_of

HUB = "hub"
"""The entry of a dictionary's metadata that says where it was downloaded from."""
_SNAPSHOT = re.compile(
    r"/models--(?P<organisation>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(?:/(?P<path>.*))?"
)
_SHA256, _SHA1 = 64, 40
_LARGEST_SMALL_FILE = 1 << 28


@dataclass(frozen=True)
class Snapshot:
    """Where a dictionary in the hub's cache is from.

    Attributes:
        repository: on the hub.
        commit: 40 hexadecimal digits.
        path: in the repository.
    """

    repository: str
    commit: str
    path: str

    @staticmethod
    def of(place: Path) -> Snapshot | None:
        """That of a path in the hub's cache; None for every other path."""
        match = _SNAPSHOT.search(place.absolute().as_posix())
        if match is None or ".." in place.parts:
            return None
        return Snapshot(f"{match['organisation']}/{match['name']}", match["commit"], match["path"] or "")

    @property
    def record(self) -> dict[str, Any]:
        """What the dictionary's metadata says about it."""
        known = release_of(self.repository, self.path)
        release = {} if known is None else {"release": known[0]}
        return {HUB: {"repository": self.repository, "commit": self.commit, "path": self.path, **release}}

    def origin(self, stated: Mapping[str, Any]) -> dict[str, Any]:
        """Metadata of a dictionary of another toolkit with what its release knows, which counts more than its files.

        Args:
            stated: the metadata that its files state.
        """
        known = release_of(self.repository, self.path)
        if known is None:
            return dict(stated)
        facts = RELEASES[known[0]].origin(known[1])
        model = stated.get("model")
        return {**stated, **facts, "model": {**(model if isinstance(model, Mapping) else {}), **facts["model"]}}

    @property
    def published(self) -> dict[str, Any]:
        """Metadata with the numbers that its release states; empty if there are none."""
        known = release_of(self.repository, self.path)
        numbers = None if known is None else RELEASES[known[0]].published.get(known[1])
        if known is None or numbers is None:
            return {}
        return {PUBLISHED: replace(numbers, source=f"release {known[0]}, in {REGISTRY}").to_json()}

    @property
    def scale(self) -> float | None:
        """The constant that activations were multiplied by, if its release knows one that its files do not say."""
        known = release_of(self.repository, self.path)
        return None if known is None else RELEASES[known[0]].scales.get(known[1])


def check_content(path: Path) -> None:
    """Compare a file in the hub's cache with the hash that the hub gave for it, which is the name of its content there.

    Large files have their SHA-256, others that of Git. Files whose content has another name are not checked.

    Raises:
        DamagedError: it differs, or is missing.
    """
    content = path.resolve()
    expected, remedy = content.name, f"delete {str(content)!r}, and it is downloaded again"
    if not re.fullmatch(r"[0-9a-f]+", expected) or len(expected) not in (_SHA256, _SHA1):
        return
    if len(expected) == _SHA256:
        accepted = {sha256_of(content)}
    else:
        whole = read_whole(content, _LARGEST_SMALL_FILE, remedy)
        head = b"blob %d\0" % len(whole)
        accepted = {hashlib.sha1(head + whole).hexdigest(), hashlib.sha1(whole).hexdigest()}  # the latter of mirrors
    if expected not in accepted:
        raise damaged(
            path, f"damaged or changed: its hash is not {expected[:12]}…, which the hub gave for it", remedy
        )  # fmt: skip
