"""The sparse core in autograd: every gradient against the dense formula's, in float64, dense and in factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sae.kernels import back_end
from sae.kernels.interface import Gradient, Selection, Subset
from sae.kernels.pattern import Pattern
from sae.kernels.sparse import (
    GradientSink,
    decode,
    encode_at,
    padded,
    rows_of,
    select_above,
    select_batch_topk,
    select_topk,
)
from tests.support.kernel_cases import CASES, Case

RULES = ["topk", "batch topk", "above"]


def select(case: Case, b_dec: Tensor, rule: str) -> Selection:
    if rule == "topk":
        return select_topk(case.x, b_dec, case.encoder, case.bias, case.k)
    if rule == "batch topk":
        return select_batch_topk(case.x, b_dec, case.encoder, case.bias, case.k)
    return select_above(case.x, b_dec, case.encoder, case.bias, torch.full_like(case.bias, 0.7))


def whole(gradient: Gradient, like: Tensor) -> Tensor:
    """The matrix that a gradient in factors stands for."""
    total = torch.zeros_like(like) if gradient.dense is None else gradient.dense.clone()
    for term in gradient.terms:
        total += back_end("reference").feature_sums(term)
    for block in gradient.blocks:
        total.index_add_(0, block.features, block.gradient)
    return total


@pytest.mark.parametrize("in_factors", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_the_dense_formula_s(name: str, rule: str, in_factors: bool) -> None:
    case = CASES[name]
    generator = torch.Generator().manual_seed(5)
    b_dec = torch.randn(case.x.shape[1], generator=generator, dtype=torch.float64)
    decoder = torch.randn(case.encoder.shape, generator=generator, dtype=torch.float64)
    target = torch.randn(case.x.shape, generator=generator, dtype=torch.float64)
    selection = select(case, b_dec, rule)
    inputs = [tensor.clone().requires_grad_() for tensor in (case.x, b_dec, case.encoder, case.bias, decoder)]

    x, bias, encoder, b_enc, dec = inputs
    kept = selection.pattern.dense(torch.ones_like(selection.values))
    features = ((x - bias) @ encoder.T + b_enc).relu() * kept
    expected = torch.autograd.grad((features @ dec + bias - target).square().sum(), inputs)

    sinks = (GradientSink(), GradientSink()) if in_factors else (None, None)
    values = encode_at(x, bias, encoder, b_enc, selection, sinks[0]).relu()
    loss = (decode(selection.pattern, values, dec, sinks[1]) + bias - target).square().sum()
    found = list(torch.autograd.grad(loss, inputs, allow_unused=True))
    for place, sink in ((2, sinks[0]), (4, sinks[1])):
        if sink is not None:
            assert found[place] is None
            found[place] = whole(sink.take(), inputs[place].detach())
            assert not sink.terms
    for label, ours, theirs in zip(("x", "b_dec", "encoder", "b_enc", "decoder"), found, expected, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-10, atol=1e-9, msg=lambda text, label=label: f"{label}: {text}"
        )


def test_gradients_of_some_rows_go_to_the_sink_as_a_block() -> None:
    matrix = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    features, factor, sink = torch.tensor([5, 0, 3]), torch.randn(3, 3, dtype=torch.float64), GradientSink()
    (expected,) = torch.autograd.grad((rows_of(matrix, features) * factor).sum(), matrix)
    (rows_of(matrix, features, sink) * factor).sum().backward()
    assert matrix.grad is None
    assert torch.equal(whole(sink.take(), matrix.detach()), expected)


def test_padded_codes_are_sorted_and_whole() -> None:
    pattern = Pattern(torch.tensor([3, 1, 4, 2, 0]), torch.tensor([0, 3, 3, 5]), 6)
    values, features = padded(pattern, torch.tensor([1.0, 3.0, 2.0, 5.0, 7.0]))
    assert values.tolist() == [[3, 2, 1], [0, 0, 0], [7, 5, 0]]
    assert features[0].tolist() == [1, 4, 3]
    assert features[2, :2].tolist() == [0, 2]
    empty, _ = padded(Pattern(torch.zeros(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 6), torch.zeros(0))
    assert empty.tolist() == [[0], [0]]


@pytest.mark.parametrize("rule", ["topk", "batch topk"])
def test_a_bfloat16_product_selects_and_float32_values_come_back(rule: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, encoder = torch.randn(50, 32, generator=generator), torch.randn(640, 32, generator=generator)
    b_enc, b_dec, low = torch.randn(640, generator=generator), torch.randn(32, generator=generator), encoder.bfloat16()
    choose = select_topk if rule == "topk" else select_batch_topk
    subset = Subset(torch.arange(0, 640, 7), torch.zeros(92), 3)
    exact = choose(x, b_dec, encoder, b_enc, 8, subset)
    rounded = choose(x, b_dec, encoder, b_enc, 8, subset, low)
    pre = (x - b_dec) @ encoder.T + b_enc
    torch.testing.assert_close(rounded.values, pre[rounded.pattern.rows, rounded.pattern.features])
    same = rounded.pattern.dense(torch.ones(400)) * exact.pattern.dense(torch.ones(400))
    assert 0.95 < float(same.sum()) / 400 <= 1, "bfloat16 chooses other features than float32, beyond its rounding"


def test_a_bfloat16_product_leaves_no_rounding_in_the_second_selection() -> None:
    generator = torch.Generator().manual_seed(0)
    x, encoder = torch.randn(50, 32, generator=generator), torch.randn(640, 32, generator=generator)
    b_enc, b_dec, low = torch.randn(640, generator=generator), torch.randn(32, generator=generator), encoder.bfloat16()
    features = torch.arange(0, 640, 7)
    penalty = torch.zeros(92).masked_fill(torch.arange(92) % 5 == 0, -torch.inf)
    selection = select_topk(x, b_dec, encoder, b_enc, 8, Subset(features, penalty, 3), low)
    assert selection.subset_values is not None and selection.subset_places is not None
    pre = ((x - b_dec) @ encoder[features].T + b_enc[features] + penalty).gather(1, selection.subset_places)
    torch.testing.assert_close(selection.subset_values, pre, rtol=1e-5, atol=1e-5)


def test_codes_have_the_number_type_of_the_encoder() -> None:
    """Whatever type the product was summed in."""
    encoder = torch.randn(6, 3).half().requires_grad_()
    x, b_enc, b_dec = torch.randn(2, 3).half(), torch.zeros(6).half(), torch.zeros(3).half()
    selection = Selection(Pattern.from_indices(torch.tensor([[0], [4]]), 6), torch.tensor([1.5, 2.5]))
    values = encode_at(x, b_dec, encoder, b_enc, selection)
    assert values.dtype is torch.float16
    values.sum().backward()
    assert encoder.grad is not None and encoder.grad.dtype is torch.float16
