"""Inputs for the back ends, ordinary and degenerate."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from sae.kernels.interface import Selection


@dataclass(frozen=True)
class Case:
    """x `[batch, d_in]`, encoder `[d_sae, d_in]`, bias `[d_sae]`, and how many features a row selects."""

    x: Tensor
    encoder: Tensor
    bias: Tensor
    k: int

    def to(self, like: Tensor | str) -> Case:
        """Of a tensor's dtype and on its device, or on the device of that name."""
        return Case(self.x.to(like), self.encoder.to(like), self.bias.to(like), self.k)


def _case(batch: int, d_in: int, d_sae: int, k: int, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, d_in), (d_sae, d_in), (d_sae,)
    return Case(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes), k)


def _cases() -> dict[str, Case]:
    ordinary, few_positive, repeated, zero = (_case(9, 12, 40, 4) for _ in range(4))
    few_positive.bias.sub_(6.0)
    repeated.x[1:] = repeated.x[0]
    zero.x[2:5] = 0
    ties = _case(5, 7, 64, 3)
    ties.encoder[1:] = ties.encoder[0]
    ties.bias.fill_(0.5)
    unequal = _case(8, 12, 96, 3)
    unequal.x[3] *= 100
    never = _case(9, 12, 40, 4)
    never.bias[::3] = -1e3
    return {
        "ordinary": ordinary,
        "fewer positive than k": few_positive,
        "repeated rows": repeated,
        "zero rows": zero,
        "nothing but ties": ties,
        "one row takes nearly all": unequal,
        "features nobody picks": never,
        "one row": _case(1, 12, 40, 4),
        "one feature": _case(6, 12, 1, 1),
        "one number": _case(6, 1, 40, 4),
        "all features": _case(6, 5, 24, 24),
        "groups of columns": _case(7, 9, 1280, 3),
        "odd sizes": _case(13, 37, 331, 5),
    }


CASES = _cases()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where the Triton back end is tested: in its interpreter if there is no GPU."""


def rows(selection: Selection) -> list[list[float]]:
    """Every row's selected values in descending order."""
    offsets = selection.pattern.offsets.tolist()
    values = selection.values.double()
    return [sorted(values[a:b].tolist(), reverse=True) for a, b in itertools.pairwise(offsets)]


def check_selection(selection: Selection, case: Case, tolerance: float) -> None:
    """The pattern is well formed, and every value is the pre-activation of its row and feature."""
    pattern = selection.pattern
    assert pattern.offsets[0] == 0
    assert int(pattern.offsets[-1]) == len(pattern.features) == len(selection.values)
    pairs = list(zip(pattern.rows.tolist(), pattern.features.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs), "a feature was selected twice in a row"
    pre = case.x.double() @ case.encoder.double().T + case.bias.double()
    torch.testing.assert_close(
        selection.values.double(), pre[pattern.rows, pattern.features], rtol=tolerance, atol=tolerance * 100
    )
