"""Leaves out of training the rare activations that lie many times as far from the mean as others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_TRIMMED = 1024
"""One row in so many, the farthest, does not count in what is usual in a batch."""
_JUMP = 2.0
"""How many times the usual distance of earlier batches that of a batch can be."""
_RATE = 0.05
"""Weight of a batch in the running mean of the usual distance."""
_RARE = 8
"""If more than one row in so many lies too far, they are no outliers."""
_LEAST_SHARE = 0.25
"""Least part of the variance that is not that of outliers; below, the scale comes from the first batch."""
_UNITS = 2.0**40
"""What the largest square becomes before squares are rounded and added as integers."""


@dataclass(frozen=True)
class Cleaned:
    """A batch without outliers.

    Attributes:
        x, target: input and target of the step, with other rows of the batch in the place of outliers.
        variance: variance of `target`, summed over its width.
        usual: the running mean of usual distances including this batch, for input and target.
        left_out: number of rows that were replaced.
    """

    x: Float[Tensor, "batch d_in"]
    target: Float[Tensor, "batch d_out"]
    variance: Float[Tensor, ""]
    usual: Float[Tensor, " sides"]
    left_out: Int[Tensor, ""]


class Outliers:
    """Replaces rows that are farther from the mean of all rows than `multiple` times the usual distance.

    A few tokens of a language model have activations tens or thousands of times as long as all others. In BatchTopK
    most features fire on such a token, and in every architecture the token dominates the gradients of its step.

    The usual distance of a batch is the one such that rows farther away have half of its Σ‖x − mean‖². Unlike a median
    of distances, it is not zero if most rows are equal. The farthest row in 1,024 does not count, and neither does what
    exceeds twice the running mean of earlier batches, so that several outliers in a batch do not make themselves
    usual. If more than an eighth of a batch lies too far, the data have changed, and nothing is left out.

    The n-th outlier of a batch is replaced by its n-th row that is none.

    Args:
        multiple: `train.max_activation_norm_multiple`; None: nothing is left out.
        means: mean of all inputs and, if the target is not the input, of all targets, in units of training.
        is_replayable: whether steps can be recorded and replayed, so that nothing may depend on the numbers of a batch.

    Attributes:
        usual: running mean of the usual distances from each mean, in units of training; 0 before the first batch.
        left_out: number of rows replaced so far.
    """

    def __init__(self, multiple: float | None, means: Sequence[Float[Tensor, " _"]], *, is_replayable: bool) -> None:
        device = means[0].device
        self.multiple, self.means = multiple, tuple(means)
        self._asks = device.type == "cpu" and not is_replayable  # on a CPU, asking is cheaper
        self.usual = torch.zeros(len(means), dtype=torch.float64, device=device)
        self.left_out = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def clean(self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"]) -> Cleaned:
        """A batch without outliers. `record` makes it count; until then, nothing here has changed."""
        if self.multiple is None:
            return Cleaned(x, target, variance(target, self.means[-1]), self.usual, torch.zeros_like(self.left_out))
        sides = (x,) if target is x else (x, target)
        distances = [_distances(side, mean) for side, mean in zip(sides, self.means, strict=True)]
        references = [self._reference(side, number) for number, side in enumerate(distances)]
        far = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for side, reference in zip(distances, references, strict=True):
            far |= _too_far(side, reference, self.multiple)
        now = torch.stack(references)
        usual = torch.where(self.usual > 0, self.usual.lerp(now, _RATE), now)
        if self._asks and not bool(far.any()):
            return Cleaned(x, target, variance(target, self.means[-1], distances[-1]), usual, far.sum())
        rows = _rows_instead(far)
        cleaned = x.index_select(0, rows)
        cleaned_target = cleaned if target is x else target.index_select(0, rows)
        spread = variance(cleaned_target, self.means[-1], distances[-1].index_select(0, rows))
        return Cleaned(cleaned, cleaned_target, spread, usual, far.sum())

    def record(self, cleaned: Cleaned) -> None:
        """Count a batch that a step was taken on."""
        self.usual.copy_(cleaned.usual)
        self.left_out += cleaned.left_out

    @torch.no_grad()
    def without(self, rows: Float[Tensor, "rows d_in"]) -> Float[Tensor, "kept d_in"]:
        """Inputs without outliers, judged like a batch."""
        if self.multiple is None:
            return rows
        distances = _distances(rows, self.means[0])
        return rows[~_too_far(distances, self._reference(distances, 0), self.multiple)]

    def rescale(self, first: Cleaned) -> list[float]:
        """Change units if outliers make up most of the variance that they come from. Waits for the device.

        Returns:
            For each side how many times as large its activations become: 1, unless the variance of the first batch is
            less than a quarter of 1 per dimension.
        """
        factors = [1.0] * len(self.means)
        if self.multiple is not None:
            for number, (side, mean) in enumerate(zip((first.x, first.target), self.means, strict=False)):
                share = float(variance(side, mean)) / side.shape[1]
                if 0 < share < _LEAST_SHARE:
                    factors[number] = share**-0.5
                    mean.mul_(factors[number])
        return factors

    def state_dict(self) -> dict[str, Any]:
        return {"means": list(self.means), "usual": self.usual.clone(), "left_out": self.left_out.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for mean, saved in zip(self.means, state["means"], strict=True):
            mean.copy_(saved)
        self.usual.copy_(state["usual"])
        self.left_out.copy_(state["left_out"])

    def _reference(self, distances: Float[Tensor, " batch"], side: int) -> Float[Tensor, ""]:
        """The usual distance that a batch is judged by; 0 if none is known."""
        usual, before = _usual(distances), self.usual[side]
        most = _JUMP * before
        return torch.where((most > 0) & (usual > most), most, usual)


def _too_far(distances: Float[Tensor, " batch"], usual: Float[Tensor, ""], multiple: float) -> Bool[Tensor, " batch"]:
    """Rows to leave out. One that is not finite is no outlier: training stops there and says so."""
    far = (distances > multiple * usual) & (usual > 0) & distances.isfinite()
    return far & (far.sum() * _RARE <= len(far))


def variance(
    x: Float[Tensor, "batch width"], near: Float[Tensor, " width"], distances: Float[Tensor, " batch"] | None = None
) -> Float[Tensor, ""]:
    """Variance, summed over the width: E‖x − near‖² − ‖E x − near‖², from a point near the mean.

    Args:
        x: rows.
        near: the point.
        distances: of the rows from it, if they are known.
    """
    squares = (_distances(x, near) if distances is None else distances).square()
    return squares.mean() - (x.mean(0) - near).square().sum()


def _distances(x: Float[Tensor, "batch width"], point: Float[Tensor, " width"]) -> Float[Tensor, " batch"]:
    return torch.linalg.vector_norm(x - point, dim=-1)


def _usual(distances: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """The distance such that farther rows have half of the sum of squares, without the farthest rows."""
    kept = distances.double().sort(descending=True).values[max(1, len(distances) // _TRIMMED) :]
    if len(kept) == 0:
        return distances.new_zeros((), dtype=torch.float64)
    shares = (kept / kept[0].clamp_min(torch.finfo(kept.dtype).tiny)).square()
    energy = (shares * _UNITS).to(torch.int64).cumsum(0)  # of floats, a GPU's sums differ from run to run
    place = (2 * energy < energy[-1]).sum().clamp(max=len(kept) - 1)
    return kept.take(place)


def _rows_instead(far: Bool[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """For each row its own number; for the n-th that is far, that of the n-th that is not."""
    good = far.to(torch.int8).sort(stable=True).indices
    number = (far.cumsum(0) - 1).clamp(min=0)
    return torch.where(far, good.take(number), torch.arange(len(far), device=far.device))
