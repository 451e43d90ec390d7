"""The back end for CPUs if Numba is installed: what PyTorch's operators do in several passes is done in one.

- **Selection.** Each thread multiplies its rows with some hundred features and takes the largest from the result while
  it is in its core's cache; the bias is added on the way.
- **Products with codes.** A row of the decoder is multiplied and added where it is read.
- **Update.** A feature's gradient is summed in the cache, projected and used by Adam; the weight is renormalised and
  rounded to bfloat16 before the next feature.

Rows or features are divided among threads, and every sum is made by one thread in a fixed order, so that results repeat
bit for bit. They differ from those of PyTorch's operators by rounding. What has no compiled code here, and all products
with dense codes, is computed by `sae.kernels.cpu`.
"""

from __future__ import annotations

from sae.kernels.cpu import column_sums, feature_sums, gradient_squares, select_above
from sae.kernels.numba.codes import decode, residual, sampled_product
from sae.kernels.numba.select import select_batch_topk, select_topk
from sae.kernels.numba.update import adam_

__all__ = [
    "adam_",
    "column_sums",
    "decode",
    "feature_sums",
    "gradient_squares",
    "residual",
    "sampled_product",
    "select_above",
    "select_batch_topk",
    "select_topk",
]
