"""Ways to damage a file of a run folder, by name (`DAMAGES`). Each takes the file and a random generator."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(max(1, path.stat().st_size)))


def empty(path: Path, rng: random.Random) -> None:
    os.truncate(path, 0)


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def fifo(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def loop(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.name)


def swap(path: Path, rng: random.Random) -> None:
    """With another file of the run, of the same kind if there is one."""
    run = next(parent for parent in path.parents if parent.name == "run")
    content = path.read_bytes()
    others = [other for other in sorted(run.rglob("*")) if other.is_file() and other.read_bytes() != content]
    alike = [other for other in others if other.suffix == path.suffix and path.suffix]
    other = rng.choice(alike or others)
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def wrong_number(path: Path, rng: random.Random) -> None:
    """Another digit in a number."""
    text = path.read_text(encoding="utf-8")
    places = [match.start() for match in re.finditer(r"(?<=[\s\[:,.])\d", text)]
    if not places:
        flip(path, rng)
        return
    place = rng.choice(places)
    other = rng.choice([digit for digit in "123456789" if digit != text[place]])
    path.write_text(text[:place] + other + text[place + 1 :], encoding="utf-8")


def wrong_type(path: Path, rng: random.Random) -> None:
    """A value of another type, anywhere in the tree."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    places = list(_places(tree))
    value = rng.choice([None, "text", [], {}, -1, 1.5, True, 10**30, "../../etc/passwd", float("inf")])
    if not places:
        tree = value
    else:
        parent, key = rng.choice(places)
        parent[key] = value
    path.write_text(json.dumps(tree), encoding="utf-8")


def odd_json(path: Path, rng: random.Random) -> None:
    """Too deep, a number too long, a key twice, not UTF-8, half a surrogate pair."""
    content = path.read_bytes()
    odd = [b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b'{"format": 1, "format": 2}', b"\xff" + content]
    path.write_bytes(rng.choice([*odd, b'{"a": "\\ud800"}', b"null", b"[]", b'"text"', b"NaN"]))


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(tree[key])


def unlisted(change: Callable[[Path, random.Random], None]) -> Callable[[Path, random.Random], None]:
    """The change, in a folder without hashes, as older versions wrote them."""

    def changed(path: Path, rng: random.Random) -> None:
        (path.parent / "SHA256SUMS").unlink(missing_ok=True)
        change(path, rng)

    return changed


ANY = {
    "bit": flip, "truncated": truncate, "emptied": empty, "deleted": delete, "swapped": swap, "FIFO": fifo,
    "folder": folder, "link to itself": loop,
}  # fmt: skip
OF_JSON = {"number": wrong_number, "type": wrong_type, "odd": odd_json}
UNLISTED = {f"{name}, no hashes": unlisted(change) for name, change in {"type": wrong_type, "odd": odd_json}.items()}
DAMAGES = {**ANY, **OF_JSON, **UNLISTED}
