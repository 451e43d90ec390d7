"""How close reconstructions come to the activations: mse, fvu, cosine, norms, bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary.base import Dictionary
from sae.dictionary.codes import Codes
from sae.evaluation.metrics import estimates
from sae.results.estimate import DocumentSums, Estimate, double, to_json


@dataclass(frozen=True)
class Reconstruction:
    """x̂, and the codes it was decoded from, if any."""

    x_hat: Float[Tensor, "rows d_in"]
    codes: Codes | None = None


@dataclass(frozen=True)
class Reconstructor:
    """A dictionary or a baseline, as a function of activations.

    Attributes:
        description: one line for tables and captions.
        features: number of features its codes index; 0 if it has no codes.
        reconstruct: the function, of activations `[rows, d_in]` on its device.
        reads: hook point of these activations, if it differs from that of the reconstructions (a transcoder).
    """

    description: str
    features: int
    reconstruct: Callable[[Tensor], Reconstruction]
    reads: str | None = None

    def __call__(self, x: Float[Tensor, "rows d_in"]) -> Reconstruction:
        return self.reconstruct(x)


def from_dictionary(dictionary: Dictionary, description: str, reads: str | None = None) -> Reconstructor:
    """A dictionary as a reconstructor: encode once, decode from the codes."""

    def reconstruct(x: Tensor) -> Reconstruction:
        codes = dictionary.encode_sparse(x)
        return Reconstruction(dictionary.decode_sparse(codes, like=x), codes)

    return Reconstructor(description, dictionary.d_sae, reconstruct, reads)


@dataclass(frozen=True)
class ReconstructionScores:
    """Scores over the evaluated tokens, with x̂ the reconstruction of x and x̄ the mean of x.

    Attributes:
        mse: mean of ‖x − x̂‖², summed over d_in, in squared units of the activations.
        fvu: Σ‖x − x̂‖² / Σ‖x − x̄‖², the fraction of variance unexplained: 1 for x̂ = x̄, 0 for x̂ = x. Its standard error
            takes x̄ as known.
        explained_variance: 1 − fvu.
        cosine: mean cos(x, x̂); 0 if x̂ = 0. Tokens with x = 0 are left out.
        l2_ratio: mean ‖x̂‖/‖x‖; below 1, reconstructions shrink. Tokens with x = 0 are left out.
        relative_reconstruction_bias: E‖x̂‖² / E[x·x̂]; 1 if no rescaling of x̂ lowers the mse, below 1 for shrinkage.
            Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated Sparse Autoencoders".
        totals: the sums over documents that these are computed from.
    """

    mse: Estimate
    fvu: Estimate
    explained_variance: Estimate
    cosine: Estimate
    l2_ratio: Estimate
    relative_reconstruction_bias: Estimate
    totals: dict[str, Tensor] = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        return to_json(self)


@dataclass(frozen=True)
class Truth:
    """A block of activations in float64, with quantities that all reconstructions of it share."""

    x: Float[Tensor, "rows d_in"]
    deviation: Float[Tensor, " rows"]
    norm: Float[Tensor, " rows"]

    @staticmethod
    def of(x: Float[Tensor, "rows d_in"], mean: Float[Tensor, " d_in"]) -> Truth:
        """Compute ‖x − x̄‖² and ‖x‖ of each token.

        Args:
            x: the activations.
            mean: x̄ over the evaluated tokens, float64.
        """
        x = double(x)
        return Truth(x, (x - mean.to(x.device)).square_().sum(-1), x.norm(dim=-1))


class ReconstructionSums:
    """Accumulates blocks of tokens into `ReconstructionScores`.

    Args:
        documents: number of documents in the split.
    """

    def __init__(self, documents: int) -> None:
        names = ("error", "deviation", "cosine", "l2_ratio", "nonzero", "power", "product")
        self.sums = DocumentSums(documents, names)

    def add_(self, truth: Truth, x_hat: Float[Tensor, "rows d_in"], documents: Tensor) -> None:
        """Add a block of tokens."""
        x_hat, norm = double(x_hat), truth.norm
        error, product = (truth.x - x_hat).square_().sum(-1), (truth.x * x_hat).sum(-1)
        power = x_hat.square().sum(-1)
        norm_hat, nonzero = power.sqrt(), norm > 0
        both = norm * norm_hat
        values = {
            "error": error,
            "deviation": truth.deviation,
            "cosine": torch.where(both > 0, product / both.where(both > 0, torch.ones_like(both)), 0),
            "l2_ratio": torch.where(nonzero, norm_hat / norm.where(nonzero, torch.ones_like(norm)), 0),
            "nonzero": nonzero.double(),
            "power": power,
            "product": product,
        }
        self.sums.add_(documents, values)

    def scores(self) -> ReconstructionScores:
        """The scores of everything added."""
        totals = self.sums.totals()
        return ReconstructionScores(**estimates(ReconstructionScores, totals), totals=totals)
