"""What Numba's back end does to be fast: tiles, threads, loops compiled once. None of it changes a result."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sae import kernels
from sae.kernels import back_end, threads
from sae.kernels.interface import AdamStep, FactoredGradient, Gradient, Moments, RowGradient, Subset
from sae.kernels.pattern import Pattern
from tests.support.kernel_cases import CASES, check_selection

pytest.importorskip("numba")

import numba
import numba.core.caching

from sae.kernels.numba import codes, compiled, select, update
from sae.kernels.numba.largest import Largest


@pytest.fixture(autouse=True)
def torch_s_threads_stay() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


NUMBERS = {
    "random": torch.randn(6, 800, generator=torch.Generator().manual_seed(0)),
    "ascending": torch.linspace(-3, 5, 4800).view(6, 800),
    "descending": torch.linspace(5, -3, 4800).view(6, 800),
    "equal": torch.full((6, 800), 0.25),
    "few values": torch.arange(4800).remainder(3).float().view(6, 800),
    "infinite": torch.full((6, 800), -torch.inf).index_fill(1, torch.tensor([3, 700]), torch.inf),
}


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("columns", [1, 13, 64, 800])
@pytest.mark.parametrize("k", [1, 7, 200])
def test_the_largest_of_tiles_are_topk_s(kind: str, columns: int, k: int) -> None:
    numbers, offsets = NUMBERS[kind], torch.zeros(800)
    for shared in (False, True):
        largest = Largest(1 if shared else 6, k, numbers.numpy().dtype)
        for first in range(0, 800, columns):
            part = slice(first, first + columns)
            largest.take(numbers[:, part].contiguous(), offsets[part], first, 800 if shared else 0)
        values, places = map(torch.from_numpy, largest.cut())
        expected = numbers.view(1, -1) if shared else numbers
        assert torch.equal(values, expected.gather(1, places))
        assert places.sort(1).values.diff(dim=1).all(), "a place twice"
        assert torch.equal(values.sort(1).values, expected.topk(k).values.sort(1).values)


def test_numbers_in_bfloat16_are_taken_as_they_are_and_offsets_in_float32() -> None:
    numbers, offsets = NUMBERS["random"].bfloat16(), torch.randn(800, generator=torch.Generator().manual_seed(1))
    largest = Largest(6, 5, offsets.numpy().dtype)
    largest.take(numbers, offsets, 0, 0)
    values, places = map(torch.from_numpy, largest.cut())
    sums = numbers.float() + offsets
    assert torch.equal(values, sums.gather(1, places))
    assert torch.equal(values.sort(1).values, sums.topk(5).values.sort(1).values)


def test_nans_of_either_sign_are_larger_than_all_numbers() -> None:
    numbers = NUMBERS["random"].clone()
    numbers[:, [5, 400, 799]] = torch.tensor([torch.nan, -torch.nan, torch.inf])
    largest = Largest(6, 3, numbers.numpy().dtype)
    for first in range(0, 800, 200):
        largest.take(numbers[:, first : first + 200].contiguous(), torch.zeros(200), first, 0)
    _, places = largest.cut()
    assert [sorted(row) for row in places.tolist()] == [[5, 400, 799]] * 6


@pytest.mark.parametrize("name", CASES)
def test_the_rows_of_a_part_change_nothing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case = CASES[name]
    count = case.k * len(case.x)
    monkeypatch.setattr(select, "MOST_ROWS", 2)
    monkeypatch.setattr(select, "TILE_NUMBERS", 0)
    monkeypatch.setattr(select, "LEAST_COLUMNS", 9)
    expected = back_end("reference").select_batch_topk(case.x, case.encoder, case.bias, count)
    selection = select.select_batch_topk(case.x, case.encoder, case.bias, count)
    check_selection(selection, case, 1e-12)
    torch.testing.assert_close(selection.values.sort().values, expected.values.sort().values, rtol=1e-12, atol=1e-12)
    places = selection.pattern.rows * len(case.bias) + selection.pattern.features
    assert (places.diff() > 0).all(), "not ordered by row, then by feature"
    check_selection(select.select_topk(case.x, case.encoder, case.bias, case.k), case, 1e-12)


def test_a_part_that_holds_more_than_its_share_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is selected stands in the last rows, of which a share of it is far too little."""
    generator = torch.Generator().manual_seed(0)
    x, encoder = torch.randn(16, 8, generator=generator), torch.randn(2048, 8, generator=generator)
    x[12:] *= 50
    monkeypatch.setattr(select, "MOST_ROWS", 4)
    rows: list[int] = []
    product = select.tile_product
    monkeypatch.setattr(select, "tile_product", lambda x, *rest: rows.append(len(x)) or product(x, *rest))
    selection = select.select_batch_topk(x, encoder, torch.zeros(2048), 64)
    assert rows == [4] * 5, "the case is not the one meant"
    expected = (x @ encoder.T).flatten().topk(64).values
    torch.testing.assert_close(selection.values.sort().values, expected.sort().values)
    assert selection.pattern.rows.min() >= 12


def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a selection it may: how rows are divided may decide how their product is rounded."""
    generator = torch.Generator().manual_seed(0)
    x, encoder, start = (torch.randn(n, 37, generator=generator) for n in (19, 331, 331))
    selection = select.select_batch_topk(x, encoder, torch.zeros(331), 95)
    pattern, values = selection.pattern, selection.values
    block = RowGradient(torch.tensor([330, 2]), x[:2])
    monkeypatch.setattr(update, "MOST_FEATURES", 40)

    def results(count: int) -> list[Tensor]:
        torch.set_num_threads(count)
        residual, products = codes.residual(pattern, values, start, x[0], x)
        weight, copy, moments = start.clone(), start.bfloat16(), Moments(start * 0, start * 0)
        gradient = Gradient((FactoredGradient(pattern, values, residual),), (block,))
        update.adam_(weight, moments, gradient, AdamStep(0.1, 0.9, 0.99, 1e-8, 1, unit_rows=True), copy)
        sampled = codes.sampled_product(pattern, x, encoder)
        return [codes.decode(pattern, values, encoder), sampled, residual, products, weight, moments.first, copy]

    alone = results(1)
    for count in (2, 3):
        for found, expected in zip(results(count), alone, strict=True):
            assert torch.equal(found, expected)


def test_parts_cover_the_whole_once_and_use_one_thread_of_torch_s_each() -> None:
    torch.set_num_threads(3)
    for length, most in ((0, None), (1, None), (10, None), (10, 2), (3, 100)):
        times, torch_s = torch.zeros(length), set()

        def part(start: int, stop: int, times: Tensor = times, torch_s: set[int] = torch_s) -> None:
            times[start:stop] += 1
            torch_s.add(torch.get_num_threads())

        threads.in_parts(part, length, most)
        assert times.eq(1).all()
        assert torch_s <= {1} or length < 2, "threads of threads wait for each other"
    with pytest.raises(ZeroDivisionError):
        threads.in_parts(lambda start, stop: 1 // start, 9)


def test_threads_compute_in_the_caller_s_inference_mode_too() -> None:
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    x, encoder = torch.randn(9, 8, generator=generator), torch.randn(64, 8, generator=generator, requires_grad=True)
    subset = Subset(torch.arange(0, 64, 3), torch.zeros(22), 2)
    with torch.inference_mode():
        inside = x.clone(), encoder.clone()
        for chosen in (select.select_topk, select.select_batch_topk):
            selection = chosen(*inside, inside[1][:, 0].clone(), 3, subset)
            codes.decode(selection.pattern, selection.values, inside[1])
            codes.residual(selection.pattern, selection.values, inside[1], x[0], inside[0])
    expected = select.select_batch_topk(x, encoder, encoder[:, 0], 3, subset)
    assert torch.equal(selection.values, expected.values)


def test_the_copy_is_rounded_as_pytorch_rounds() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 32, generator=generator) * 10.0 ** torch.randint(-38, 38, (64, 32), generator=generator)
    weight[0, :6] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 3.4e38, 1 + 2**-8])
    copy, moments = torch.zeros(64, 32).bfloat16(), Moments(torch.zeros(64, 32), torch.zeros(64, 32))
    update.adam_(weight, moments, Gradient(), AdamStep(0.0, 0.9, 0.99, 1e-8, 1), copy)
    assert torch.equal(copy.view(torch.int16)[~weight.isnan()], weight.bfloat16().view(torch.int16)[~weight.isnan()])
    assert copy.isnan().equal(weight.isnan())


def test_terms_of_half_precision_and_of_other_strides_are_taken() -> None:
    pattern = Pattern.from_indices(torch.tensor([[0, 2], [1, 2]]), 40)
    values, matrix = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.arange(120.0).view(3, 40).T
    assert not matrix.is_contiguous()
    expected = pattern.dense(values) @ matrix
    assert torch.equal(codes.decode(pattern, values.half(), matrix), expected)


@pytest.mark.parametrize("reason", ["not installed", "not wanted"])
def test_without_numba_pytorch_s_operators_compute(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    def chosen() -> object:
        for cached in (kernels.fastest, kernels._has_numba):
            cached.cache_clear()
        return kernels.kernels_for(torch.zeros(1))

    if reason == "not installed":
        monkeypatch.setitem(sys.modules, "numba", None)
    else:
        monkeypatch.setenv("SAE_KERNELS", "cpu")
    assert chosen() is back_end("cpu")
    monkeypatch.undo()
    assert chosen() is back_end("numba")


def test_a_step_leaves_the_cores_to_the_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(3)
    sizes: list[int] = []
    with kernels.operators_beside(torch.zeros(1)):
        assert torch.get_num_threads() == 1
        threads.in_parts(lambda start, stop: sizes.append(stop - start), 9)
        assert torch.get_num_threads() == 1
    assert sizes == [3, 3, 3]
    assert torch.get_num_threads() == 3
    monkeypatch.setattr(kernels, "fastest", lambda *_: "cpu")
    with kernels.operators_beside(torch.zeros(1)):
        assert torch.get_num_threads() == 3


def test_loops_compile_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an installation that is read-only, of a user without a writable home."""
    monkeypatch.setattr(numba.core.caching.FunctionCache._impl_class, "_locator_classes", [])

    def double(x: int) -> int:
        return 2 * x

    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(double)
    assert compiled.compiled(double)(21) == 42
