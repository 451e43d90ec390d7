"""Random streams by purpose: the only place where the toolkit creates generators.

A purpose and some numbers, such as a seed, determine a stream. Both are hashed into the generator's state, so streams
that differ in purpose or numbers are unrelated. No stream equals one seeded elsewhere with a small number
(`torch.manual_seed(n)`, `np.random.seed(n)`, `np.random.default_rng(n)`, `random.seed(n)`): directions that a user
plants in data are never the initial weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
import random
from collections.abc import Iterator

import numpy as np
import torch

STREAMS = 2
"""Version of the streams, recorded in resumable states; a state without a version began with version 1."""
_WORDS = 624
_WORDS_AT = 24
"""Offset of the Mersenne Twister's words in the state of a CPU generator of torch; each takes eight bytes."""


def torch_generator(purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator of torch: a Mersenne Twister whose 624 words all come from the hash.

    `manual_seed` would use 32 bits of the hash, and one stream in 65,536 would equal that of a number below 2¹⁶.
    """
    hashed = _hashed("torch", purpose, numbers, 4 * _WORDS)
    generator = torch.Generator().manual_seed(int.from_bytes(hashed[:7], "little"))  # returned by `initial_seed`
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
    """A hash in [0, 2⁶⁴), for code that computes pseudorandom numbers itself."""
    return int.from_bytes(_hashed("number", purpose, numbers, 8), "little")


@contextlib.contextmanager
def global_stream(device: torch.device, purpose: str, *numbers: int) -> Iterator[None]:
    """While open, PyTorch's own generators are at the start of a stream, for libraries that draw from them."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.random.set_rng_state(torch_generator(purpose, *numbers).get_state())
        if device.type == "cuda":
            torch.cuda.manual_seed(number(purpose, *numbers) >> 1)
        yield


def loader_generator_1(*numbers: int) -> np.random.Generator:
    """Version 1 of the loader's streams, for trainings started with it."""
    return np.random.default_rng(numbers)


def document_random_1() -> random.Random:
    """Version 1 of the stream that shuffles documents, for caches whose text was written with it."""
    return random.Random(0)


def _hashed(kind: str, purpose: str, numbers: tuple[int, ...], length: int) -> bytes:
    """`length` bytes of SHAKE-256 over a text that is unique to the kind, purpose and numbers."""
    text = json.dumps([kind, purpose, *map(operator.index, numbers)])
    return hashlib.shake_256(text.encode()).digest(length)
