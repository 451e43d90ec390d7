"""Random streams by purpose: the one place where the toolkit's generators are made.

A stream follows from a purpose and some numbers, such as a seed. Both are hashed into the generator's state, so streams
of two purposes, or of other numbers, have nothing in common, and none is what a small number seeds elsewhere
(`torch.manual_seed(n)`, `np.random.seed(n)`, `np.random.default_rng(n)`, `random.seed(n)`): whatever a user plants in
data, training does not begin with it.
"""

from __future__ import annotations

import hashlib
import json
import operator
import random

import numpy as np
import torch

STREAMS = 2
"""Version of the streams, recorded by what can be resumed; what records none was begun with version 1."""
_WORDS = 624
_WORDS_AT = 24
"""Where the words of the Mersenne Twister begin in the state of a CPU generator of torch, each in eight bytes."""


def torch_generator(purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator of torch: a Mersenne Twister all of whose 624 words are hashed.

    `manual_seed` would use 32 bits of the hash, and one stream in 65,536 would be that of a number below 2¹⁶.
    """
    hashed = _hashed("torch", purpose, numbers, 4 * _WORDS)
    generator = torch.Generator().manual_seed(int.from_bytes(hashed[:7], "little"))  # what `initial_seed` returns
    words = torch.from_numpy(np.frombuffer(hashed, dtype="<u4").astype(np.int64))
    state = generator.get_state()
    state[_WORDS_AT : _WORDS_AT + 8 * _WORDS].view(torch.int64).copy_(words)
    return generator.set_state(state)


def numpy_generator(purpose: str, *numbers: int) -> np.random.Generator:
    """A generator of NumPy: PCG64DXSM, not `default_rng`'s PCG64, seeded with a hash of 256 bits."""
    seed = int.from_bytes(_hashed("numpy", purpose, numbers, 32), "little")
    return np.random.Generator(np.random.PCG64DXSM(seed))


def python_random(purpose: str, *numbers: int) -> random.Random:
    """A generator of the standard library, seeded with a hash of 512 bits."""
    return random.Random(int.from_bytes(_hashed("python", purpose, numbers, 64), "little"))


def number(purpose: str, *numbers: int) -> int:
    """A hash in [0, 2⁶⁴), for what computes pseudorandom numbers by itself."""
    return int.from_bytes(_hashed("number", purpose, numbers, 8), "little")


def loader_generator_1(*numbers: int) -> np.random.Generator:
    """Version 1 of the loader's streams, for trainings that began with it."""
    return np.random.default_rng(numbers)


def document_random_1() -> random.Random:
    """Version 1 of the stream that shuffles documents, for caches whose text was written with it."""
    return random.Random(0)


def _hashed(kind: str, purpose: str, numbers: tuple[int, ...], length: int) -> bytes:
    """So many bytes of SHAKE-256 over a text that no other kind, purpose or numbers have."""
    text = json.dumps([kind, purpose, *map(operator.index, numbers)])
    return hashlib.shake_256(text.encode()).digest(length)
