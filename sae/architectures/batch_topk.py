"""BatchTopK: k features per token on average over a batch, shared out by strength."""

from __future__ import annotations

from typing import ClassVar

from sae.architectures.elementwise import OneThreshold


class BatchTopK(OneThreshold):
    """f = z · [z > θ],  z = ReLU((x − b_dec) W_enc + b_enc),  x̂ = f W_dec + b_dec.

    In training the k · batch largest z of each batch fire, whatever the row. θ is the smallest of them on the rows that
    come next, so that afterwards each token is encoded by itself, with k features on average.

    Bussmann et al. 2024, "BatchTopK Sparse Autoencoders".
    """

    architecture: ClassVar[str] = "batch_topk"
