"""What is particular to the Triton back end: guesses that hit and miss, bfloat16, NaN."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from tests.support.quick import quick_for

pytest.importorskip("triton")

from sae.kernels import back_end
from sae.kernels.triton import batch, select_above, select_batch_topk, select_topk, strategies, topk
from tests.support.kernel_cases import CASES, DEVICE, Case, check_selection, rows

REFERENCE = back_end("reference")


@pytest.mark.parametrize(
    ("d_sae", "k"), [(24576, 32), (24576, 64), (131072, 32), (131072, 64), (32768, 256), (4096, 1)]
)
def test_a_guess_misses_as_seldom_as_promised(d_sae: int, k: int) -> None:
    """The two tails of the binomial, in exact fractions."""
    scheme = topk.plan(d_sae, k)
    assert scheme is not None
    assert scheme.rank > 0
    assert scheme.capacity <= d_sae // 4
    share = Fraction(1, scheme.stride)

    def below(n: int, limit: int) -> Fraction:
        return sum(math.comb(n, i) * share**i * (1 - share) ** (n - i) for i in range(min(limit, n + 1)))

    assert 1 - below(k - 1, scheme.rank) < topk.MISS, "too few candidates too often"
    assert below(scheme.capacity, scheme.rank) < topk.MISS, "too many candidates too often"
    assert 1 - below(k - 1, scheme.rank - 1) >= topk.MISS, "a lower rank would do"


def some(seed: int = 0, d_sae: int = 160) -> Case:
    generator = torch.Generator().manual_seed(seed)
    x, encoder = torch.randn(9, 12, generator=generator), torch.randn(d_sae, 12, generator=generator)
    return Case(x, encoder, torch.randn(d_sae, generator=generator), 5).to(DEVICE)


def use(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(strategies, "STRATEGIES", dict.fromkeys(strategies.STRATEGIES, ((0, name),)))


def guessing(monkeypatch: pytest.MonkeyPatch, rank: int, capacity: int) -> None:
    """The fused kernel, with a plan of the test's."""
    use(monkeypatch, strategies.FUSED)
    monkeypatch.setattr(topk, "plan", lambda d_sae, k: topk.Plan(4, rank, capacity))


@pytest.mark.parametrize("miss", quick_for(["never"], ["never", "too few", "too many", "sometimes"]))
def test_the_selection_is_exact_whether_a_guess_hits_or_misses(monkeypatch: pytest.MonkeyPatch, miss: str) -> None:
    case = some()
    rank, capacity = {"never": (10, 160), "too few": (3, 128), "too many": (30, 16), "sometimes": (2, 16)}[miss]
    guessing(monkeypatch, rank, capacity)
    if miss == "too few":
        case.bias[::4] += 50.0  # all that is large is in the sample
    pre = case.x @ case.encoder.T + case.bias
    guess = (case.x @ case.encoder[::4].T + case.bias[::4]).topk(rank).values[:, -1:]
    candidates = (pre >= guess).sum(1)
    missed = (candidates < case.k) | (candidates > capacity)
    expected = {"never": not missed.any(), "too few": missed.all(), "too many": missed.all()}
    assert expected.get(miss, missed.any() and not missed.all()), "the case is not the one meant"
    selection = select_topk(case.x, case.encoder, case.bias, case.k)
    check_selection(selection, case, 2e-6)
    for row, other in zip(rows(selection), pre.topk(case.k).values.tolist(), strict=True):
        assert row == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize(
    "name", quick_for(["odd sizes"], ["odd sizes", "nothing but ties", "one feature", "zero rows"])
)
def test_the_fused_kernels_select_what_the_others_do(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    use(monkeypatch, strategies.FUSED)
    case = CASES[name].to(torch.empty(0, device=DEVICE))
    operands = case.x, case.encoder, case.bias
    threshold = torch.linspace(0, 1, len(case.bias), device=DEVICE)
    for ours, expected in (
        (select_topk(*operands, case.k), REFERENCE.select_topk(*operands, case.k)),
        (select_above(*operands, threshold), REFERENCE.select_above(*operands, threshold)),
    ):
        check_selection(ours, case, 2e-6)
        for row, other in zip(rows(ours), rows(expected), strict=True):
            assert row == pytest.approx(other, rel=2e-6, abs=2e-4)


def test_the_order_of_features_is_fixed_and_ties_go_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    guessing(monkeypatch, 12, 512)
    case = some()
    case.x[:], case.encoder[:], case.bias[:] = 1.0, 0.5, 1.0
    case.bias[100:103] = 2.0
    selection = select_topk(case.x, case.encoder, case.bias, case.k)
    assert selection.pattern.features.view(9, 5).tolist() == [[0, 1, 100, 101, 102]] * 9


@pytest.mark.parametrize("guess", [-torch.inf, torch.inf, None])
@pytest.mark.parametrize("name", quick_for(["buffered"], ["buffered", "fused"]))
@pytest.mark.parametrize("unequal", [False, True])
def test_the_batch_s_selection_is_exact_whether_its_guess_hits_or_misses(
    monkeypatch: pytest.MonkeyPatch, guess: float | None, name: str, unequal: bool
) -> None:
    use(monkeypatch, name)
    case = some()
    if unequal:
        case.x[3] *= 100
    assert batch.plan(9, 160, 45).capacity < 9 * 160, "everything would fit, so no guess could be too low"
    if guess is not None:
        monkeypatch.setattr(batch, "_guess", lambda *_: torch.tensor(guess, device=DEVICE))
    selection = select_batch_topk(case.x, case.encoder, case.bias, 45)
    check_selection(selection, case, 2e-6)
    expected = REFERENCE.select_batch_topk(case.x, case.encoder, case.bias, 45)
    torch.testing.assert_close(selection.values.sort().values, expected.values.sort().values)
    assert selection.pattern.rows.tolist() == sorted(selection.pattern.rows.tolist())


@pytest.mark.parametrize(
    ("rows", "d_sae", "k"), [(512, 4096, 8), (64, 24576, 32), (512, 24576, 32), (1024, 131072, 32)]
)
def test_the_batch_s_guess_misses_as_seldom_as_promised(rows: int, d_sae: int, k: int) -> None:
    """Both tails, by the binomial of another library."""
    count = k * rows
    scheme = batch.plan(rows, d_sae, count)
    assert scheme.capacity < rows * d_sae / 4

    def below(n: int, limit: int) -> float:
        law = torch.distributions.Binomial(n, torch.tensor(scheme.sampled / d_sae, dtype=torch.float64))
        return float(law.log_prob(torch.arange(limit, dtype=torch.float64)).exp().sum())

    assert 1 - below(count - 1, scheme.rank) < batch.MISS, "too few candidates too often"
    assert below(scheme.capacity, scheme.rank) < batch.MISS, "too many candidates too often"
    assert 1 - below(count - 1, scheme.rank - 1) >= batch.MISS, "a lower rank would do"


def test_ties_beyond_the_room_never_take_the_place_of_larger_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four numbers are positive, in the last tile; all others are equal, and far more than there is room for."""
    monkeypatch.setattr(batch, "plan", lambda *_: batch.Plan(64, 3, 40))
    x, encoder, bias = (torch.zeros(shape, device=DEVICE) for shape in ((8, 4), (512, 4), (512,)))
    x[4:, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    encoder[511, 0] = 1.0
    selection = select_batch_topk(x, encoder, bias, 8)
    assert selection.values.sort().values.tolist() == [0, 0, 0, 0, 1, 2, 3, 4]
    check_selection(selection, Case(x, encoder, bias, 1), 1e-6)


@pytest.mark.parametrize("select", [select_topk, select_batch_topk])
@pytest.mark.parametrize("sign", [1, -1])
def test_not_a_number_ends_and_shows(monkeypatch: pytest.MonkeyPatch, select, sign: int) -> None:
    guessing(monkeypatch, 12, 256)
    case = some()
    case.x[2, 3] = math.copysign(math.nan, sign)
    selection = select(case.x, case.encoder, case.bias, 5 if select is select_topk else 45)
    assert selection.values.isnan().any()
    assert int(selection.pattern.features.max()) < 160


def test_half_precision_operands_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """float16, as Triton's interpreter cannot multiply bfloat16 matrices."""
    guessing(monkeypatch, 12, 256)
    case = some()
    x, encoder = case.x.half(), case.encoder.half()
    selection = select_topk(x, encoder, case.bias, case.k)
    assert selection.values.dtype is torch.float32
    check_selection(selection, Case(x, encoder, case.bias, case.k), 1e-6)
