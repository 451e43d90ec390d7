"""How close reconstructions come to the activations: mse, fvu, cosine, norms, bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary import Codes, Dictionary
from sae.evaluation.estimate import TOKENS, DocumentSums, Estimate, double, ratio, to_json


@dataclass(frozen=True)
class Reconstruction:
    """x̂, and the codes it was decoded from where there are any."""

    x_hat: Float[Tensor, "rows d_in"]
    codes: Codes | None = None


@dataclass(frozen=True)
class Reconstructor:
    """What is evaluated: a dictionary or a baseline.

    Attributes:
        description: one line for tables and captions.
        features: number of features its codes index; 0 where it has no codes.
        reconstruct: from activations `[rows, d_in]`, on the device it was made for.
        reads: hook point of these activations, where that is not the one whose activations it gives (a transcoder).
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
        return Reconstruction(dictionary.decode_sparse(codes), codes)

    return Reconstructor(description, dictionary.d_sae, reconstruct, reads)


_NAMES = ("mse", "fvu", "explained_variance", "cosine", "l2_ratio", "relative_reconstruction_bias")


@dataclass(frozen=True)
class ReconstructionScores:
    """Over the evaluated tokens, with x̂ the reconstruction of x and x̄ the mean of x.

    Attributes:
        mse: mean of ‖x − x̂‖², summed over d_in, in squared units of the activations.
        fvu: Σ‖x − x̂‖² / Σ‖x − x̄‖², the fraction of variance unexplained: 1 for x̂ = x̄, 0 for x̂ = x. Its standard error
            takes x̄ as known.
        explained_variance: 1 − fvu.
        cosine: mean cos(x, x̂); 0 where x̂ = 0. Tokens with x = 0 are left out.
        l2_ratio: mean ‖x̂‖/‖x‖; below 1, reconstructions shrink. Tokens with x = 0 are left out.
        relative_reconstruction_bias: E‖x̂‖² / E[x·x̂]; 1 where no rescaling of x̂ lowers the mse, below 1 for shrinkage.
            Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated Sparse Autoencoders".
    """

    mse: Estimate
    fvu: Estimate
    explained_variance: Estimate
    cosine: Estimate
    l2_ratio: Estimate
    relative_reconstruction_bias: Estimate

    def to_json(self) -> dict[str, Any]:
        return to_json(self, _NAMES)


class ReconstructionSums:
    """Streams tokens and ends in `ReconstructionScores`.

    Args:
        documents: how many documents the split has.
        mean: x̄ over the evaluated tokens, float64.
    """

    def __init__(self, documents: int, mean: Float[Tensor, " d_in"]) -> None:
        names = ("error", "deviation", "cosine", "l2_ratio", "nonzero", "power", "product")
        self.sums = DocumentSums(documents, names)
        self.mean = mean

    def add_(self, x: Float[Tensor, "rows d_in"], x_hat: Float[Tensor, "rows d_in"], documents: Tensor) -> None:
        """Add a block of tokens."""
        x, x_hat = double(x), double(x_hat)
        power, product = x_hat.square().sum(-1), (x * x_hat).sum(-1)
        norm, norm_hat = x.norm(dim=-1), power.sqrt()
        nonzero = norm > 0
        both = norm * norm_hat
        values = {
            "error": (x - x_hat).square().sum(-1),
            "deviation": (x - self.mean.to(x.device)).square().sum(-1),
            "cosine": torch.where(both > 0, product / both.where(both > 0, torch.ones_like(both)), 0),
            "l2_ratio": torch.where(nonzero, norm_hat / norm.where(nonzero, torch.ones_like(norm)), 0),
            "nonzero": nonzero.double(),
            "power": power,
            "product": product,
        }
        self.sums.add_(documents, values)

    def scores(self) -> ReconstructionScores:
        """The scores of everything added."""
        sums = self.sums
        fvu = ratio(sums["error"], sums["deviation"])
        return ReconstructionScores(
            mse=ratio(sums["error"], sums[TOKENS]),
            fvu=fvu,
            explained_variance=Estimate(None if fvu.value is None else 1 - fvu.value, fvu.standard_error),
            cosine=ratio(sums["cosine"], sums["nonzero"]),
            l2_ratio=ratio(sums["l2_ratio"], sums["nonzero"]),
            relative_reconstruction_bias=ratio(sums["power"], sums["product"]),
        )
