"""How selections get the encoder's product, by shape: the one place to change after `benchmarks/operations.py`."""

from __future__ import annotations

import torch
from torch import Tensor

BUFFERED = "buffered"
"""PyTorch's product, some rows at a time in a buffer, from which a kernel selects."""
FUSED = "fused"
"""Triton's product, from whose registers the same kernel selects, so that the product is never in memory."""
STRATEGIES: dict[str, tuple[tuple[int, str], ...]] = {
    "rows": ((0, BUFFERED),),
    "batch": ((0, BUFFERED),),
    "above": ((0, BUFFERED),),
}
"""For each selection, ascending, the strategy from this d_sae on. Chosen by estimate (docs/performance.md), since the
buffered one has not been timed on a GPU yet."""
BUFFER_PER_L2 = 2.0
"""Size of the buffer, relative to the device's L2 cache. What is left of it there need not be read from memory, but
smaller products are less efficient and read the encoder more often."""
LEAST_ROWS = 256
"""Fewest rows in a buffer, unless the batch has fewer."""


def strategy(selection: str, d_sae: int) -> str:
    """The strategy of a selection (`rows`, `batch`, `above`) among d_sae features."""
    return next(name for least, name in reversed(STRATEGIES[selection]) if d_sae >= least)


def is_interpreted(x: Tensor) -> bool:
    """Whether kernels run in Triton's interpreter, for tests, which get small tiles."""
    return x.device.type == "cpu"


def rows_at_once(x: Tensor, d_sae: int) -> int:
    """Number of rows in a buffer for products with d_sae features, a multiple of 128."""
    if is_interpreted(x):
        return 7
    cache = torch.cuda.get_device_properties(x.device).L2_cache_size
    most = max(LEAST_ROWS, int(BUFFER_PER_L2 * cache) // (4 * d_sae) // 128 * 128)
    buffers = max(1, -(-len(x) // most))
    return -(-len(x) // (128 * buffers)) * 128
