"""Selections from the encoder's product in a buffer: bounds, ties, NaN, and room of fixed size."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from sae.kernels import back_end
from sae.kernels.interface import NOTHING, FactoredGradient, Subset
from sae.kernels.triton import codes, rows, select_above, select_topk, strategies
from tests.support.kernel_cases import DEVICE, Case, check_selection
from tests.support.kernel_cases import rows as rows_of

REFERENCE = back_end("reference")


def some(d_sae: int = 160, batch: int = 9) -> Case:
    generator = torch.Generator().manual_seed(0)
    x, encoder = torch.randn(batch, 12, generator=generator), torch.randn(d_sae, 12, generator=generator)
    return Case(x, encoder, torch.randn(d_sae, generator=generator), 5).to(DEVICE)


@pytest.mark.parametrize("d_sae", [40, 160])
def test_the_k_largest_are_in_order_and_ties_go_to_the_first(d_sae: int) -> None:
    """With all numbers equal but three, far more reach every bound than there is room for."""
    case = some(d_sae)
    case.x[:], case.encoder[:], case.bias[:] = 1.0, 0.5, 1.0
    case.bias[30:33] = 2.0
    selection = select_topk(case.x, case.encoder, case.bias, case.k)
    assert selection.pattern.features.view(9, 5).tolist() == [[0, 1, 30, 31, 32]] * 9
    check_selection(selection, case, 1e-6)


@pytest.mark.parametrize("d_sae", [40, 160])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_few_nans_are_selected_with_the_largest_others(d_sae: int, sign: int) -> None:
    """NaNs of either sign, in two features of every row and in one whole row."""
    case = some(d_sae)
    nan = math.copysign(math.nan, sign)
    case.encoder[[7, 31], 2] = nan
    case.x[4, 0] = nan
    selection = select_topk(case.x, case.encoder, case.bias, case.k)
    features, values = selection.pattern.features.view(9, 5), selection.values.view(9, 5)
    assert values.isnan().sum(1).tolist() == [5 if row == 4 else 2 for row in range(9)]
    pre = (case.x @ case.encoder.T + case.bias).nan_to_num(nan=-torch.inf)
    for row in set(range(9)) - {4}:
        assert sorted(features[row].tolist()) == sorted([7, 31, *pre[row].topk(3).indices.tolist()])


@pytest.mark.parametrize("d_sae", [40, 160])
def test_what_is_excluded_comes_last(d_sae: int) -> None:
    case = some(400)
    features = torch.arange(0, d_sae, device=DEVICE)
    penalty = torch.full((d_sae,), -torch.inf, device=DEVICE)
    penalty[[3, 17]] = 0.0
    selection = select_topk(case.x, case.encoder, case.bias, 3, Subset(features, penalty, 6))
    values, places = selection.subset_values, selection.subset_places
    assert values is not None and places is not None
    expected = (case.x @ case.encoder[[3, 17]].T + case.bias[[3, 17]]).sort(1).values
    torch.testing.assert_close(values.sort(1).values[:, -2:], expected)
    assert (values.sort(1).values[:, :-2] == -torch.inf).all()
    assert all(len(set(row)) == 6 and {3, 17} <= set(row) for row in places.tolist())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_operands_are_summed_in_float32(dtype: torch.dtype) -> None:
    case = some()
    x, encoder = case.x.to(dtype), case.encoder.to(dtype)
    selection = select_topk(x, encoder, case.bias, case.k)
    assert selection.values.dtype is torch.float32
    check_selection(selection, Case(x, encoder, case.bias, case.k), 1e-6)
    expected = REFERENCE.select_topk(x.float(), encoder.float(), case.bias, case.k)
    for row, other in zip(rows_of(selection), rows_of(expected), strict=True):
        assert row == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("k", [1, 16, 17, 32, 100, 1000, 2048])
@pytest.mark.parametrize("d_sae", [6144, 24576, 131072])
def test_candidates_fit_into_their_room(k: int, d_sae: int) -> None:
    """On normal numbers, by the algorithm in plain PyTorch: how many reach the k-th largest maximum of the groups."""
    groups = rows.number_of_groups(torch.empty(0, device="meta"), k)
    assert 2 * k <= groups <= rows.MOST_GROUPS
    pre = torch.randn(d_sae, generator=torch.Generator().manual_seed(k))
    padding = torch.full((-d_sae % groups,), -torch.inf)
    maxima = torch.cat([pre, padding]).view(-1, groups).amax(0)
    bound = maxima.topk(k).values[-1]
    coarse = (bound.view(torch.int32) >> 16 << 16).view(torch.float32)
    assert k <= int((pre >= coarse).sum()) <= max(64, rows.power_of_two(2 * k))


def test_the_strategy_follows_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "STRATEGIES", {"rows": ((0, "fused"), (1000, "buffered"))})
    assert [strategies.strategy("rows", d_sae) for d_sae in (1, 999, 1000, 50_000)] == ["fused"] * 2 + ["buffered"] * 2


@pytest.mark.parametrize("capacity", [400, 20])
def test_room_for_a_fixed_number_of_pairs(capacity: int) -> None:
    """The pairs that are there, then padding that belongs to no row and no feature; or as many as there is room for."""
    case = some()
    threshold = torch.linspace(2, 4, 160, device=DEVICE)
    expected = select_above(case.x, case.encoder, case.bias, threshold)
    count = expected.pattern.pairs
    assert 20 < count < 400
    selection = select_above(case.x, case.encoder, case.bias, threshold, capacity)
    assert selection.total is not None and int(selection.total) == count
    pattern = selection.pattern
    assert len(selection.values) == pattern.pairs == capacity
    if capacity < count:
        assert int(pattern.offsets[-1]) == capacity
        return
    assert torch.equal(pattern.offsets, expected.pattern.offsets)
    assert torch.equal(pattern.features[:count], expected.pattern.features)
    assert torch.equal(pattern.rows[:count], expected.pattern.rows)
    assert torch.equal(selection.values[:count], expected.values)
    assert (selection.values[count:] == NOTHING).all()
    assert (pattern.features[count:] == 0).all() and (pattern.rows[count:] == 8).all()
    for ours, theirs in zip(pattern.by_feature, expected.pattern.by_feature, strict=True):
        assert torch.equal(ours[: len(theirs)], theirs)
    decoder, gradient = case.encoder, case.x
    values = selection.values.where(selection.values > 0, 0)
    assert torch.equal(codes.decode(pattern, values, decoder), codes.decode(expected.pattern, values[:count], decoder))
    dots = codes.sampled_product(pattern, gradient, decoder)
    assert torch.equal(dots[:count], codes.sampled_product(expected.pattern, gradient, decoder))
    assert (dots[count:] == 0).all()
    for sums, others in (
        (codes.column_sums(pattern, values), codes.column_sums(expected.pattern, values[:count])),
        (
            codes.feature_sums(FactoredGradient(pattern, values, gradient)),
            codes.feature_sums(FactoredGradient(expected.pattern, values[:count], gradient)),
        ),
    ):
        assert torch.equal(sums, others)


def test_more_pairs_than_usual_are_found_in_a_second_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from sae.kernels.triton import batch

    case = some()
    threshold = torch.zeros(160, device=DEVICE)
    expected = REFERENCE.select_above(case.x, case.encoder, case.bias, threshold)
    monkeypatch.setattr(batch, "PAIRS_PER_ROW", 2)
    assert expected.pattern.pairs > 2 * 9
    selection = select_above(case.x, case.encoder, case.bias, threshold)
    assert torch.equal(selection.pattern.features, expected.pattern.features)
    assert torch.equal(selection.pattern.offsets, expected.pattern.offsets)
    torch.testing.assert_close(selection.values, expected.values)
