"""How sparse codes are: L0, L1, firing densities, dead and dense features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.dictionary.codes import Codes
from sae.evaluation.metrics import estimates
from sae.results.estimate import DocumentSums, Estimate, double

DENSE_ABOVE = 0.1
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
BINS_PER_DECADE = 4
SPARSITY_NAMES = ("l0", "l0_quantiles", "l1", "density", "dead", "dense")


@dataclass(frozen=True)
class SparsityScores:
    """Scores over the evaluated tokens.

    Attributes:
        tokens: their number; whether a feature counts as dead depends on it.
        l0: mean count of non-zero features per token.
        l0_counts: tokens by their L0: entry j is the number of tokens with j features.
        l1: mean Σ|f|.
        firings: number of tokens each feature fires on.
        totals: the sums over documents that l0 and l1 are computed from.
    """

    tokens: int
    l0: Estimate
    l0_counts: Int[Tensor, " counts"]
    l1: Estimate
    firings: Int[Tensor, " d_sae"]
    totals: dict[str, Tensor] = field(repr=False, compare=False)

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of the tokens each feature fires on, float64."""
        return self.firings.double() / self.tokens

    @property
    def dead(self) -> int:
        """Features that fire on none of the tokens."""
        return int((self.firings == 0).sum())

    @property
    def dense(self) -> int:
        """Features that fire on more than a tenth of the tokens."""
        return int((self.density > DENSE_ABOVE).sum())

    @property
    def l0_quantiles(self) -> dict[str, int]:
        """The smallest L0 that at least this share of the tokens do not exceed."""
        cumulative = self.l0_counts.cumsum(0)
        ranks = [max(1, math.ceil(quantile * self.tokens)) for quantile in QUANTILES]
        return {f"{q:g}": int((cumulative < rank).sum()) for q, rank in zip(QUANTILES, ranks, strict=True)}

    def density_histogram(self) -> tuple[list[float], list[int]]:
        """Edges in log10 density, from the decade of one firing up to 0; features in each bin, without dead ones."""
        lowest = -math.ceil(math.log10(self.tokens)) if self.tokens > 1 else -1
        bins = -lowest * BINS_PER_DECADE
        edges = [lowest + number / BINS_PER_DECADE for number in range(bins + 1)]
        alive = self.density[self.firings > 0].log10()
        place = torch.bucketize(alive, torch.tensor(edges, dtype=torch.float64, device=alive.device), right=True) - 1
        return edges, torch.bincount(place.clamp(0, bins - 1), minlength=bins).tolist()

    def to_json(self) -> dict[str, Any]:
        density = self.density
        edges, counts = self.density_histogram()
        return {
            "l0": self.l0.to_json(),
            "l0_quantiles": self.l0_quantiles,
            "l1": self.l1.to_json(),
            "density": {
                "mean": float(density.mean()),
                "median": float(density.median()),
                "max": float(density.max()),
                "log10_histogram": {"edges": edges, "features": counts},
            },
            "dead": {"features": self.dead, "share": self.dead / len(density), "tokens": self.tokens},
            "dense": {"features": self.dense, "density_above": DENSE_ABOVE},
        }


class SparsityCounts:
    """Accumulates codes into `SparsityScores`.

    Args:
        documents: number of documents in the split.
        features: number of features that the codes index.
    """

    def __init__(self, documents: int, features: int) -> None:
        self.sums = DocumentSums(documents, ("l0", "l1"))
        self.firings = torch.zeros(features, dtype=torch.long)
        self.l0_counts = torch.zeros(1, dtype=torch.long)

    def add_(self, codes: Codes, documents: Tensor) -> None:
        """Add a block of tokens."""
        fires = codes.values != 0
        l0 = fires.sum(-1).cpu()
        self.firings += torch.bincount(codes.indices[fires].cpu(), minlength=len(self.firings))
        counts = torch.bincount(l0, minlength=len(self.l0_counts))
        counts[: len(self.l0_counts)] += self.l0_counts
        self.l0_counts = counts
        self.sums.add_(documents, {"l0": l0.double(), "l1": double(codes.values).abs().sum(-1)})

    def state_dict(self) -> dict[str, Tensor]:
        """The counts, for `load_state_dict`."""
        return {**self.sums.state_dict(), "firings": self.firings, "l0_counts": self.l0_counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from counts of the same documents and features."""
        self.sums.load_state_dict(state)
        self.firings, self.l0_counts = state["firings"], state["l0_counts"]

    def scores(self) -> SparsityScores:
        """The scores of everything added."""
        totals = self.sums.totals()
        return SparsityScores(
            self.sums.tokens, l0_counts=self.l0_counts, firings=self.firings, totals=totals,
            **estimates(SparsityScores, totals),
        )  # fmt: skip
