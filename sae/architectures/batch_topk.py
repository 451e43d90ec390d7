"""BatchTopK: k features per token on average over a batch, the strongest of the batch."""

from __future__ import annotations

from sae.architectures.elementwise import OneThreshold


class BatchTopK(OneThreshold):
    """f = z · [z > θ],  z = ReLU((x − b_dec) W_enc + b_enc),  x̂ = f W_dec + b_dec.

    In training the k · batch largest z of each batch fire, in any row. θ is the smallest of them on the rows that come
    next, so that afterwards each token is encoded independently, with k features on average.

    Bussmann et al. 2024, "BatchTopK Sparse Autoencoders".
    """

    architecture = "batch_topk"
