"""Baselines of transcoders: the best affine map from what they read, and their own skip connection alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
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

RIDGES = (0.0, *(10.0**power for power in range(-6, 3)), math.inf)
"""Strengths of regularisation, in units of the mean variance of x; with the last, the map is the mean."""
_RUN, _RUNS = 64, 5
"""Tokens in a run, and how many runs there are to one that is held back."""
_LEAST = 32
"""Fewest tokens held back that can choose λ."""
_TOLERANCE, _ROUNDING = 1.01, 1e-9


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


@dataclass
class _Sums:
    """Sums over tokens, in float64: of x, y, their products with x, and squares of y."""

    tokens: int
    parts: list[Tensor]

    @staticmethod
    def of(x: Float[Tensor, "rows d_in"], y: Float[Tensor, "rows d_out"]) -> _Sums:
        return _Sums(len(x), [x.sum(0), y.sum(0), x.T @ x, x.T @ y, (y**2).sum(0)])

    def add_(self, other: _Sums) -> None:
        for total, part in zip(self.parts, other.parts, strict=True):
            total.add_(part)
        self.tokens += other.tokens

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.tokens + other.tokens, [a + b for a, b in zip(self.parts, other.parts, strict=True)])

    def means(self) -> tuple[Float[Tensor, " d_in"], Float[Tensor, " d_out"]]:
        """x̄ and ȳ."""
        x, y, *_ = self.parts
        return x / self.tokens, y / self.tokens

    def covariances(
        self, x: Float[Tensor, " d_in"], y: Float[Tensor, " d_out"]
    ) -> tuple[Float[Tensor, "d_in d_in"], Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"]]:
        """Means of products around any x and y: of x with itself, of x with y, and of squares of y."""
        (mean_x, mean_y), (squares, products, of_y) = self.means(), (part / self.tokens for part in self.parts[2:])
        off_x, off_y = mean_x - x, mean_y - y
        return (
            squares - torch.outer(mean_x, mean_x) + torch.outer(off_x, off_x),
            products - torch.outer(mean_x, mean_y) + torch.outer(off_x, off_y),
            of_y - mean_y**2 + off_y**2,
        )


class LeastSquares:
    """The affine map of least Σ‖y − ŷ‖² + n λ ‖W‖², from sums in float64. λ is the best one for tokens held back.

    One run of 64 tokens in five is held back. From the others, a map is made for every λ in `RIDGES`, in units of the
    mean variance of x; the weakest λ is taken whose error on the tokens held back is at most 1 % above the least.
    The map is then made from all tokens. Without it, a map from few tokens for each number in x is far worse than the
    mean; with λ = ∞ it is the mean. It is the mean, too, if fewer than 32 tokens are held back.

    Everything is summed around the mean of the first block, so that a large mean costs no digits. Directions in which x
    does not vary, but for rounding, get no weight: with λ = 0, of all best maps this is the one with the smallest ‖W‖.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._shifts: tuple[Tensor, Tensor] | None = None
        self._sums: dict[bool, _Sums] = {}

    def add_(self, x: Float[Tensor, "rows d_in"], y: Float[Tensor, "rows d_out"]) -> None:
        """Add tokens."""
        if not len(x):
            return
        x, y = double(x), double(y)
        if self._shifts is None:
            self._shifts = x.mean(0), y.mean(0)
        x, y = x - self._shifts[0], y - self._shifts[1]
        numbers = torch.arange(self.tokens, self.tokens + len(x), device=x.device)
        held_back = numbers // _RUN % _RUNS == _RUNS - 1
        for kind, rows in ((False, ~held_back), (True, held_back)):
            if rows.any():
                sums = _Sums.of(x[rows], y[rows])
                if kind in self._sums:
                    self._sums[kind].add_(sums)
                else:
                    self._sums[kind] = sums
        self.tokens += len(x)

    def solve(self) -> AffineMap:
        """The map, in float64: W = (C + λ)⁻¹ C_xy, with the covariances C of x and C_xy of x and y."""
        return next(self.solve_each([len(self._all().parts[1])]))

    def solve_each(self, widths: Sequence[int]) -> Iterator[AffineMap]:
        """The same for parts of y of these widths, each with its own λ."""
        assert self._shifts is not None, "nothing was added"
        sums, (shift_x, shift_y) = self._all(), self._shifts
        mean_x, mean_y = sums.means()
        squares, products, _ = sums.covariances(mean_x, mean_y)
        spectrum, start = _Spectrum.of(squares), 0
        ridges = self._ridges(widths)
        for width, ridge in zip(widths, ridges, strict=True):
            part = slice(start, start + width)
            W = spectrum.vectors @ (spectrum.inverse(ridge)[:, None] * (spectrum.vectors.T @ products[:, part]))
            yield AffineMap(W, shift_x + mean_x, (shift_y + mean_y)[part])
            start += width

    def _all(self) -> _Sums:
        fitted = self._sums[False]
        return fitted + self._sums[True] if True in self._sums else fitted

    def _ridges(self, widths: Sequence[int]) -> list[float]:
        """The best λ for each part of y.

        With C = V Λ Vᵀ and D = 1/(Λ + λ), the error of W = V D G on tokens held back is tr(Wᵀ A W) − 2 tr(Wᵀ B) more
        than that of the mean, which is a quadratic form in the diagonal of D.
        """
        if True not in self._sums or self._sums[True].tokens < _LEAST:
            return [math.inf] * len(widths)
        means = self._sums[False].means()
        squares, products, _ = self._sums[False].covariances(*means)
        spectrum = _Spectrum.of(squares)
        A, B, errors_of_mean = self._sums[True].covariances(*means)
        V = spectrum.vectors
        A, B, G = V.T @ A @ V, V.T @ B, V.T @ products
        ridges = []
        for g, b, mean in zip(
            G.split(list(widths), 1), B.split(list(widths), 1), errors_of_mean.split(list(widths)), strict=True
        ):
            quadratic, linear, error_of_mean = A * (g @ g.T), (g * b).sum(1), float(mean.sum())
            errors = {}
            for ridge in RIDGES:
                d = spectrum.inverse(ridge)
                errors[ridge] = error_of_mean + float(d @ quadratic @ d - 2 * d @ linear)
            most = _TOLERANCE * min(errors.values()) + _ROUNDING * error_of_mean
            ridges.append(next(ridge for ridge in RIDGES if errors[ridge] <= most))
        return ridges


@dataclass(frozen=True)
class _Spectrum:
    """Eigenvalues and eigenvectors of a covariance."""

    values: Float[Tensor, " d_in"]
    vectors: Float[Tensor, "d_in d_in"]

    @staticmethod
    def of(covariance: Float[Tensor, "d_in d_in"]) -> _Spectrum:
        return _Spectrum(*torch.linalg.eigh(covariance))

    def inverse(self, ridge: float) -> Float[Tensor, " d_in"]:
        """1/(Λ + λ); 0 for directions that do not vary."""
        values = self.values.clamp_min(0)
        smallest = float(values.amax()) * len(values) * torch.finfo(values.dtype).eps
        if ridge == math.inf:
            return torch.zeros_like(values)
        return torch.where(values > smallest, 1 / (values + ridge * values.mean()), 0)


def fit_linear(
    cache: ActivationCache, reads: Collection[str], hook: str, device: str | torch.device = "cpu", *,
    progress: Progress = silent,
) -> dict[str, Reconstructor]:  # fmt: skip
    """ŷ = x W + c, the best affine map for training tokens, from each hook point that is read; see `LeastSquares`.

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
