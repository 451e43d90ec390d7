"""Windows around firings, compared with looking up every token of each."""

from __future__ import annotations

import pytest
import torch

from sae.features.windows import Reach, Windows

CONTEXT, D_SAE = 7, 5


@pytest.mark.parametrize(("before", "after"), [(0, 0), (3, 1), (2, 4), (30, 2), (1, 50)])
@pytest.mark.parametrize("grid_numbers", [1, 200, 1 << 27])
def test_windows_hold_what_fires_around_a_token_in_its_context(
    before: int, after: int, grid_numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae.features.windows.GRID_NUMBERS", grid_numbers)
    generator = torch.Generator().manual_seed(before + after)
    reach = Reach(before, after, CONTEXT).within_context()
    assert reach.width <= 2 * CONTEXT - 1
    windows = Windows(D_SAE, reach)
    for rows in (21, 4, 35):  # the second time, the context is short, and the grid is larger than needed
        codes = torch.randn(rows, D_SAE, generator=generator).relu() * 3
        codes[0, 1] = 1e6
        offset, feature = codes.nonzero(as_tuple=True)
        chosen = torch.randperm(len(offset), generator=generator)[:20]
        out = torch.full((len(chosen), reach.width), -1.0, dtype=torch.float16)
        column = windows.columns(torch.arange(rows))[offset]
        windows.cut(feature, column, codes[offset, feature], rows, chosen, out)
        for number, place in enumerate(chosen.tolist()):
            row, expected = int(offset[place]), []
            for other in range(row - reach.before, row + reach.after + 1):
                inside = 0 <= other < rows and other // CONTEXT == row // CONTEXT
                value = codes[other, feature[place]] if inside else torch.zeros(())
                expected.append(value.clamp(max=65504).half().item())
            assert out[number].tolist() == expected


def test_a_reach_beyond_the_context_is_cut_to_it() -> None:
    assert Reach(16, 8, 128).within_context() == Reach(16, 8, 128)
    assert Reach(16, 8, 6).within_context() == Reach(5, 5, 6)
    assert Reach(16, 8, 1).within_context() == Reach(0, 0, 1)
