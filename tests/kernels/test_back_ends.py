"""All back ends against the dense reference, in every operation, on ordinary and degenerate input."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from sae.kernels import back_end
from sae.kernels.interface import AdamStep, FactoredGradient, Gradient, Moments, RowGradient, Selection, Subset
from sae.kernels.pattern import Pattern
from tests.support.kernel_cases import CASES, DEVICE, Case, check_selection, rows

REFERENCE = back_end("reference")
_no_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
_no_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
BACK_ENDS = [
    pytest.param(("cpu", torch.float64), id="cpu-float64"),
    pytest.param(("cpu", torch.float32), id="cpu-float32"),
    pytest.param(("numba", torch.float64), id="numba-float64", marks=_no_numba),
    pytest.param(("numba", torch.float32), id="numba-float32", marks=_no_numba),
    pytest.param(("triton", torch.float32), id="triton-float32", marks=_no_triton),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
"""Relative, and for sums of some dozens of numbers of size 1 a hundredfold absolute."""


@pytest.fixture(params=BACK_ENDS)
def kernels(request: pytest.FixtureRequest):
    """A back end; a tensor of the dtype and on the device it is tested with; its tolerance."""
    name, dtype = request.param
    return back_end(name), torch.empty(0, dtype=dtype, device=DEVICE if name == "triton" else "cpu"), TOLERANCE[dtype]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def compare(selection: Selection, expected: Selection, case: Case, tolerance: float) -> None:
    check_selection(selection, case, tolerance)
    for row, other in zip(rows(selection), rows(expected), strict=True):
        assert row == pytest.approx(other, rel=tolerance, abs=100 * tolerance)


def test_the_k_largest_of_each_row(kernels, case: Case) -> None:
    ours, like, tolerance = kernels
    case = case.to(like)
    selection = ours.select_topk(case.x, case.encoder, case.bias, case.k)
    assert selection.pattern.k == case.k
    compare(selection, REFERENCE.select_topk(case.x, case.encoder, case.bias, case.k), case, tolerance)


def test_the_largest_of_the_batch(kernels, case: Case) -> None:
    ours, like, tolerance = kernels
    case = case.to(like)
    count = case.k * len(case.x)
    selection = ours.select_batch_topk(case.x, case.encoder, case.bias, count)
    check_selection(selection, case, tolerance)
    assert len(selection.values) == count
    expected = REFERENCE.select_batch_topk(case.x, case.encoder, case.bias, count)
    torch.testing.assert_close(
        selection.values.sort().values, expected.values.sort().values, rtol=tolerance, atol=100 * tolerance
    )


@pytest.mark.parametrize("level", [-1e4, 0.0, 1.5, 1e4])
def test_all_above_their_feature_s_threshold(kernels, case: Case, level: float) -> None:
    ours, like, tolerance = kernels
    case = case.to(like)
    threshold = level + torch.linspace(0, 1, len(case.bias)).to(like)
    expected = REFERENCE.select_above(case.x, case.encoder, case.bias, threshold)
    compare(ours.select_above(case.x, case.encoder, case.bias, threshold), expected, case, tolerance)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("k", [1, 3, 11])
def test_a_second_selection_in_a_subset(kernels, batched: bool, k: int) -> None:
    ours, like, tolerance = kernels
    case = CASES["groups of columns"].to(like)
    features = torch.arange(4, 1280, 116, device=like.device)
    penalty = like.new_zeros(len(features))
    penalty[2] = -torch.inf
    subset = Subset(features, penalty, k)
    expected = REFERENCE.select_topk(case.x, case.encoder, case.bias, 3, subset)
    if batched:
        selection = ours.select_batch_topk(case.x, case.encoder, case.bias, 21, subset)
    else:
        selection = ours.select_topk(case.x, case.encoder, case.bias, 3, subset)
    values, places = selection.subset_values, selection.subset_places
    assert values is not None
    torch.testing.assert_close(
        values.sort(1).values, expected.subset_values.sort(1).values, rtol=tolerance, atol=100 * tolerance
    )
    pre = (case.x @ case.encoder[features].T + case.bias[features] + penalty).gather(1, places)
    torch.testing.assert_close(values, pre, rtol=tolerance, atol=100 * tolerance)


def ragged(like: torch.Tensor, density: float, batch: int = 10, d_sae: int = 30) -> tuple[Pattern, torch.Tensor]:
    """A pattern with rows and features that have nothing, and its values."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(batch, d_sae, generator=generator) < density
    mask[[0, 4]] = False
    mask[:, [0, 7, d_sae - 1]] = False
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    pattern = Pattern(mask.nonzero()[:, 1].to(like.device), offsets.to(like.device), d_sae)
    return pattern, torch.randn(pattern.pairs, generator=generator, dtype=torch.float64).to(like)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.6])
def test_products_with_sparse_codes(kernels, density: float) -> None:
    ours, like, tolerance = kernels
    pattern, values = ragged(like, density)
    generator = torch.Generator().manual_seed(2)
    decoder, gradient = (torch.randn(n, 11, generator=generator).to(like) for n in (30, 10))
    close = {"rtol": tolerance, "atol": 100 * tolerance}
    term = FactoredGradient(pattern, values, gradient)
    torch.testing.assert_close(
        ours.decode(pattern, values, decoder), REFERENCE.decode(pattern, values, decoder), **close
    )
    torch.testing.assert_close(
        ours.sampled_product(pattern, gradient, decoder), REFERENCE.sampled_product(pattern, gradient, decoder), **close
    )
    torch.testing.assert_close(ours.feature_sums(term), REFERENCE.feature_sums(term), **close)
    for bias in (None, decoder[3]):
        found = ours.residual(pattern, values, decoder, bias, gradient)
        for ours_part, expected in zip(
            found, REFERENCE.residual(pattern, values, decoder, bias, gradient), strict=True
        ):
            torch.testing.assert_close(ours_part, expected, **close)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.6])
def test_sums_of_columns(kernels, density: float) -> None:
    ours, like, tolerance = kernels
    pattern, values = ragged(like, density)
    torch.testing.assert_close(
        ours.column_sums(pattern, values), REFERENCE.column_sums(pattern, values), rtol=tolerance, atol=100 * tolerance
    )


@pytest.mark.parametrize(
    ("name", "rows"), [pytest.param("groups of columns", 1, marks=pytest.mark.slow), ("ordinary", 5), ("ordinary", 9)]
)
def test_not_a_number_is_selected_first(kernels, name: str, rows: int) -> None:
    """So that training that diverges is seen to."""
    ours, like, _ = kernels
    case = CASES[name].to(like)
    x = case.x.clone()
    x[:rows, 0] = torch.nan
    for selection in (
        ours.select_topk(x, case.encoder, case.bias, case.k),
        ours.select_batch_topk(x, case.encoder, case.bias, case.k * len(x)),
    ):
        assert selection.values.isnan().any()
        assert len(selection.values) == case.k * len(x)
        assert int(selection.pattern.features.max()) < len(case.bias)
    above = ours.select_above(x, case.encoder, case.bias, torch.full_like(case.bias, 1e4))
    assert above.values.isnan().all()
    assert sorted(set(above.pattern.rows.tolist())) == list(range(min(rows, len(x))))


def test_a_feature_that_stands_twice_in_a_row_counts_twice(kernels) -> None:
    ours, like, _ = kernels
    pattern = Pattern.from_indices(torch.tensor([[2, 2], [0, 2]], device=like.device), 3)
    values, decoder = torch.tensor([1.0, 2.0, 4.0, 8.0]).to(like), torch.eye(3).to(like)
    expected = torch.tensor([[0.0, 0.0, 3.0], [4.0, 0.0, 8.0]]).to(like)
    torch.testing.assert_close(ours.decode(pattern, values, decoder), expected)


PARTS = ["nothing", "a term", "two terms", "three terms", "blocks", "dense", "all"]


def gradient_of(parts: str, like: torch.Tensor, d_sae: int, d_in: int) -> Gradient:
    generator = torch.Generator().manual_seed(3)

    def matrix(n: int) -> torch.Tensor:
        return torch.randn(n, d_in, generator=generator, dtype=torch.float64).to(like)

    terms = [FactoredGradient(*ragged(like, density, d_sae=d_sae), matrix(10)) for density in (0.05, 0.5, 0.03)]
    shuffled = torch.randperm(d_sae, generator=generator).to(like.device)
    blocks = [RowGradient(shuffled[:5], matrix(5)), RowGradient(shuffled[3:20].sort().values, matrix(17))]
    count = {"a term": 1, "two terms": 2, "three terms": 3, "all": 3}.get(parts, 0)
    return Gradient(
        tuple(terms[:count]),
        tuple(blocks) if parts in ("blocks", "all") else (),
        matrix(d_sae) if parts in ("dense", "all") else None,
    )


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize("scale", [None, 0.25])
def test_adam_takes_the_reference_s_steps(kernels, parts: str, unit_rows: bool, scale: float | None) -> None:
    ours, like, tolerance = kernels
    d_sae, d_in = (31 if ours is back_end("triton") else 530), 13
    gradient = gradient_of(parts, like, d_sae, d_in)
    start = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(like)
    if unit_rows:
        start = torch.nn.functional.normalize(start, dim=1)
    results = []
    for which in (ours, REFERENCE):
        weight, copy = start.clone(), like.new_zeros(d_sae, d_in, dtype=torch.bfloat16)
        moments = Moments(torch.zeros_like(weight), torch.zeros_like(weight))
        for number in range(1, 5):
            factor = None if scale is None else like.new_tensor(scale / number)
            step = AdamStep(0.01, 0.9, 0.99, 1e-8, number, unit_rows, factor)
            which.adam_(weight, moments, gradient, step, copy)
        results.append((weight, moments.first, moments.second))
        torch.testing.assert_close(copy.to(like), weight, rtol=2**-7, atol=0)  # Triton's interpreter rounds down
    assert parts == "nothing" or not torch.equal(results[0][0], start)
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=100 * tolerance, atol=100 * tolerance)
    if unit_rows:
        torch.testing.assert_close(results[0][0].norm(dim=1), like.new_ones(d_sae))


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("unit_rows", [False, True])
def test_norms_of_a_gradient_s_rows(kernels, parts: str, unit_rows: bool) -> None:
    ours, like, tolerance = kernels
    d_sae, d_in = (31 if ours is back_end("triton") else 530), 13
    gradient = gradient_of(parts, like, d_sae, d_in)
    weight = torch.nn.functional.normalize(torch.randn(d_sae, d_in, dtype=torch.float64), dim=1).to(like)
    whole = like.new_zeros(d_sae, d_in, dtype=torch.float64)
    for term in gradient.terms:
        codes = term.pattern.dense(term.coefficients.double())
        whole += codes.T @ term.rows.double()
    for block in gradient.blocks:
        whole[block.features] += block.gradient.double()
    whole += 0 if gradient.dense is None else gradient.dense.double()
    if unit_rows:
        whole -= (whole * weight).sum(1, keepdim=True) * weight
    found = ours.gradient_squares(weight, gradient, unit_rows)
    assert parts == "nothing" or found.sum() > 0
    torch.testing.assert_close(found, whole.square().sum(1).to(like), rtol=100 * tolerance, atol=100 * tolerance)


def test_reference_adam_is_torch_s() -> None:
    weight = torch.randn(6, 3, dtype=torch.float64)
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.Adam([parameter], lr=0.02, betas=(0.8, 0.95), eps=1e-8)
    moments = Moments(torch.zeros_like(weight), torch.zeros_like(weight))
    for number in range(1, 6):
        parameter.grad = torch.randn(6, 3, dtype=torch.float64)
        REFERENCE.adam_(weight, moments, Gradient(dense=parameter.grad), AdamStep(0.02, 0.8, 0.95, 1e-8, number))
        optimizer.step()
    torch.testing.assert_close(weight, parameter.data, rtol=1e-12, atol=1e-12)
