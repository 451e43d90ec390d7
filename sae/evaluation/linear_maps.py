"""Baselines of transcoders: the best affine map from what they read, and their own skip connection alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae.activations.cache import ActivationCache
from sae.config.progress import Progress, silent, within
from sae.evaluation.budget import pca_tokens
from sae.evaluation.held_out import HeldOut, training_blocks
from sae.evaluation.reconstruction import Reconstruction, Reconstructor
from sae.results.estimate import double


@dataclass(frozen=True)
class AffineMap:
    """ŷ = (x − x̄) W + ȳ. With the means of the data as x̄ and ȳ, the constant of the map is the best one for W.

    Attributes:
        W: the linear map.
        mean_x: x̄.
        mean_y: ȳ.
    """

    W: Float[Tensor, "d_in d_out"]
    mean_x: Float[Tensor, " d_in"]
    mean_y: Float[Tensor, " d_out"]

    def __call__(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_out"]:
        return (x - self.mean_x) @ self.W + self.mean_y

    def on(self, device: str | torch.device) -> AffineMap:
        """The map in float32 on a device."""
        return AffineMap(*(part.to(device, torch.float32) for part in (self.W, self.mean_x, self.mean_y)))


class LeastSquares:
    """Sums from which the affine map of least Σ‖y − ŷ‖² is computed, streamed in float64, without regularisation.

    Everything is summed around the mean of the first block, so that a large mean costs no digits. Directions in which x
    does not vary, but for rounding, get no weight: of all best maps this is the one with the smallest ‖W‖.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._shifts: tuple[Tensor, Tensor] | None = None
        self._sums: list[Tensor] = []

    def add_(self, x: Float[Tensor, "rows d_in"], y: Float[Tensor, "rows d_out"]) -> None:
        """Add tokens."""
        if not len(x):
            return
        x, y = double(x), double(y)
        if self._shifts is None:
            self._shifts = x.mean(0), y.mean(0)
        x, y = x - self._shifts[0], y - self._shifts[1]
        parts = [x.sum(0), y.sum(0), x.T @ x, x.T @ y]
        self._sums = [total.add_(part) for total, part in zip(self._sums, parts, strict=True)] if self._sums else parts
        self.tokens += len(x)

    def means(self) -> tuple[Float[Tensor, " d_in"], Float[Tensor, " d_out"]]:
        """x̄ and ȳ, float64."""
        assert self._shifts is not None, "nothing was added"
        return self._shifts[0] + self._sums[0] / self.tokens, self._shifts[1] + self._sums[1] / self.tokens

    def solve(self) -> AffineMap:
        """The best affine map, float64: W = C⁺ C_xy, with the covariances C of x and C_xy of x and y."""
        mean_x, mean_y = self.means()
        x, y, squares, products = (total / self.tokens for total in self._sums)
        values, vectors = torch.linalg.eigh(squares - torch.outer(x, x))
        smallest = float(values.amax().clamp_min(0)) * len(values) * torch.finfo(values.dtype).eps
        inverse = torch.where(values > smallest, 1 / values, 0)
        W = vectors @ (inverse[:, None] * (vectors.T @ (products - torch.outer(x, y))))
        return AffineMap(W, mean_x, mean_y)


def fit_linear(
    cache: ActivationCache, reads: Collection[str], hook: str, device: str | torch.device = "cpu", *,
    progress: Progress = silent,
) -> dict[str, Reconstructor]:  # fmt: skip
    """ŷ = x W + c, the affine map of least mse on training tokens, from each hook point that is read.

    Args:
        cache: its training tokens are read, at equal distances, as many as for principal components.
        reads: hook points of x.
        hook: hook point of y.
        device: where products are computed.
        progress: called with (stage, tokens done, total).

    Raises:
        CacheError: a training activation is not finite.
    """
    reconstructors = {}
    for name in sorted(reads):
        most, report, fit = pca_tokens(cache, name), within(progress, "linear map"), LeastSquares()
        total = min(most, cache.statistics(hook).tokens)
        report(0, total)
        for x, y in zip(training_blocks(cache, name, most), training_blocks(cache, hook, most), strict=True):
            fit.add_(x.to(device), y.to(device))
            report(fit.tokens, total)
        description = f"linear: the best affine map from {name}, fitted on {fit.tokens:,} tokens"
        reconstructors[name] = _reconstructor(fit.solve().on(device), description, name)
    return reconstructors


def skip_alone(W_skip: Float[Tensor, "d_in d_out"], held_out: HeldOut, reads: str | None) -> Reconstructor:
    """ŷ = x W_skip + c: what a dictionary gives without its features, with the best constant c for training tokens.

    Args:
        W_skip: the dictionary's skip connection.
        held_out: its cache has the training means.
        reads: hook point of x; None: that of y.
    """
    cache, hook = held_out.cache, held_out.hook
    means = (cache.statistics(name).mean for name in (reads or hook, hook))
    alone = AffineMap(W_skip.detach(), *means).on(held_out.device)
    return _reconstructor(alone, f"skip: W_skip of the dictionary alone, from {reads or hook}", reads)


def _reconstructor(affine: AffineMap, description: str, reads: str | None) -> Reconstructor:
    return Reconstructor(description, 0, lambda x: Reconstruction(affine(x)), reads)
