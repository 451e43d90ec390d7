"""Random streams that have nothing to do with each other, whatever small numbers they are seeded with."""

from __future__ import annotations

import numpy as np
import torch


def generator_of(*numbers: int) -> torch.Generator:
    """A generator whose stream follows from all the numbers together (NumPy's `SeedSequence`).

    What is planted in data must not come from `torch.Generator().manual_seed(seed)`: that is what dictionaries are
    initialised from, and with the same seed and shape training would begin with the answer.
    """
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
