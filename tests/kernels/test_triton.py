"""What is particular to the Triton back end: guesses that hit and miss, bfloat16, NaN, and code for real GPUs."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction

import pytest
import torch

from tests.support.quick import quick_for

pytest.importorskip("triton")

from sae.kernels import back_end
from sae.kernels.triton import batch, select_batch_topk, select_topk, topk
from tests.support.kernel_cases import DEVICE, Case, check_selection, rows

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


def guessing(monkeypatch: pytest.MonkeyPatch, rank: int, capacity: int) -> None:
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


def test_the_order_of_features_is_fixed_and_ties_go_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    guessing(monkeypatch, 12, 512)
    case = some()
    case.x[:], case.encoder[:], case.bias[:] = 1.0, 0.5, 1.0
    case.bias[100:103] = 2.0
    selection = select_topk(case.x, case.encoder, case.bias, case.k)
    assert selection.pattern.features.view(9, 5).tolist() == [[0, 1, 100, 101, 102]] * 9


@pytest.mark.parametrize("guess", [-torch.inf, torch.inf, None])
@pytest.mark.parametrize("unequal", [False, True])
def test_the_batch_s_selection_is_exact_whether_its_guess_hits_or_misses(
    monkeypatch: pytest.MonkeyPatch, guess: float | None, unequal: bool
) -> None:
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
def test_not_a_number_ends_and_shows(monkeypatch: pytest.MonkeyPatch, select) -> None:
    guessing(monkeypatch, 12, 256)
    case = some()
    case.x[2, 3] = torch.nan
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


COMPILE = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sae.kernels.triton import batch, codes, topk, update

SIZES = {"BLOCK_B": 128, "BLOCK_F": 128, "BLOCK_D": 64, "PRECISION": "ieee"}
FLOATS = "lr beta1 beta2 eps correction1 correction2".split()
POINTERS = {
    "counts": "*i32", "features": "*i64", "offsets": "*i64", "order": "*i64", "places": "*i64", "totals": "*i64",
    "skip": "*i32", "prefix": "*i64", "slots": "*i32", "copy": "*bf16", "chosen_features": "*i64",
}
MOST = dict(TERMS=2, DENSE=True, SLOTS=True, COPY=True, UNIT=True, SCALED=True)
LEAST = dict(TERMS=1, DENSE=False, SLOTS=False, COPY=False, UNIT=False, SCALED=False)
SQUARES = dict(TERMS=2, DENSE=True, SLOTS=True, UNIT=True, BLOCK=1024, AT_ONCE=4)
NUMBERS = "batch d_sae d_in ties_from capacity k columns rank shift".split()


def signature(kernel, constants, operand, changes):
    types = {}
    for name in kernel.arg_names:
        base = name.rstrip("_01")
        if name in constants:
            types[name] = "constexpr"
        elif name in changes:
            types[name] = changes[name]
        elif name in FLOATS:
            types[name] = "fp32"
        elif name in NUMBERS:
            types[name] = "i32"
        elif name in ("x", "encoder"):
            types[name] = operand
        else:
            types[name] = POINTERS.get(base, "*fp32")
    return types


JOBS = [
    (topk._guess_kernel, {"BLOCK": 1024}, {}, 4),
    (topk._select_kernel, {"BLOCK": 1024}, {"features": "*i32"}, 4),
    (topk._exact_row_kernel, {"BLOCK_F": 64, "BLOCK_D": 64}, {}, 4),
    (codes._weighted_sum_kernel, {"ORDERED": True, "BLOCK": 1024, "AT_ONCE": 4}, {}, 4),
    (codes._weighted_sum_kernel, {"ORDERED": False, "BLOCK": 1024, "AT_ONCE": 4}, {}, 4),
    (codes._dots_kernel, {"BLOCK": 1024, "BLOCKS": 1}, {}, 4),
    (codes._dots_kernel, {"BLOCK": 1024, "BLOCKS": 4}, {}, 4),
    (update._adam_kernel, dict(MOST, BLOCK=1024, AT_ONCE=4), {}, 4),
    (update._adam_kernel, dict(LEAST, BLOCK=8192, AT_ONCE=4), {}, 8),
    (update._squares_kernel, SQUARES, {}, 4),
]
JOBS += [
    (topk._candidates_kernel, SIZES, {"features": "*i32"}, 8),
    (batch._append_kernel, {**SIZES, "PER_FEATURE": True, "STRICT": True, "TIES_APART": False}, {}, 8),
    (batch._append_kernel, {**SIZES, "PER_FEATURE": False, "STRICT": False, "TIES_APART": False}, {}, 8),
    (batch._append_kernel, {**SIZES, "PER_FEATURE": False, "STRICT": False, "TIES_APART": True}, {}, 8),
    (batch._histogram_kernel, {**SIZES, **batch.HISTOGRAM_TILE}, {"counts": "*i64"}, 8),
]
room = {80: 163 * 1024, 90: 227 * 1024}
for capability, most in room.items():
    for kernel, constants, changes, warps in JOBS if capability == 90 else JOBS[7:8] + JOBS[10:11]:
        source = ASTSource(kernel, signature(kernel, constants, "*bf16", changes), constants)
        compiled = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": 3}
        )
        assert compiled.asm["ptx"], kernel
        assert compiled.metadata.shared <= most, (kernel, compiled.metadata.shared)
        print(capability, kernel.__name__, constants, compiled.metadata.shared, len(compiled.asm.get("cubin", b"")))
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_real_gpus(tmp_path) -> None:
    """For Ampere and Hopper, by Triton's own compiler, within their shared memory; no GPU is needed for that."""
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 15 + 2
