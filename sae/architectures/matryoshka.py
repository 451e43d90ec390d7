"""Matryoshka BatchTopK: nested dictionaries, of which each reconstructs by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

from sae.architectures.elementwise import OneThreshold

PREFIXES = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)
"""Shares of d_sae that end the nested dictionaries: each adds twice as many features as the one before."""


class Matryoshka(OneThreshold):
    """f = z · [z > θ],  z = ReLU((x − b_dec) W_enc + b_enc),  x̂_m = f[:m] W_dec[:m] + b_dec,  x̂ = x̂_d_sae.

    Trained like BatchTopK, with the mean error of x̂_m over all prefixes m, so that general features come first.

    Bussmann et al. 2025, "Learning Multi-Level Features with Matryoshka Sparse Autoencoders".

    Args:
        prefixes: ascending shares of d_sae, the last of them 1.
    """

    architecture: ClassVar[str] = "matryoshka"
    setting_names: ClassVar[tuple[str, ...]] = ("k", "prefixes")

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        k: int,
        prefixes: Sequence[float] = PREFIXES,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(d_in, d_sae, k=k, metadata=metadata)
        sizes = [round(share * d_sae) for share in prefixes]
        if not sizes or sizes[0] < 1 or sizes[-1] != d_sae or any(b <= a for a, b in pairwise(sizes)):
            raise ValueError(
                f"prefixes={list(prefixes)}: expected ascending shares of d_sae={d_sae} that end in 1 and each add a "
                f"feature at least, and these are {sizes} features"
            )
        self.prefixes, self.prefix_sizes = tuple(prefixes), tuple(sizes)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "prefixes": list(self.prefixes)}
