"""What the CPU's back end does to be fast: chunks, groups of columns, NumPy's product. None of it changes a result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sae.kernels import back_end, cpu, products
from tests.support.kernel_cases import CASES, Case, check_selection


@pytest.mark.parametrize("columns", [64, 200, 4096, 8192])
@pytest.mark.parametrize("k", [1, 7, 32])
def test_largest_is_topk(columns: int, k: int) -> None:
    pre = torch.randn(6, columns, generator=torch.Generator().manual_seed(k))
    pre[1] = -1.0
    pre[2, 5:] = pre[2, 0]
    values, places = cpu.largest(pre, k)
    assert torch.equal(values, pre.gather(1, places))
    assert places.sort(1).values.diff(dim=1).all(), "a place twice"
    assert torch.equal(values.sort(1).values, pre.topk(k).values.sort(1).values)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_the_size_of_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch, name: str, rows: int) -> None:
    case = CASES[name]
    count = case.k * len(case.x)
    whole = back_end("reference").select_batch_topk(case.x, case.encoder, case.bias, count)
    monkeypatch.setattr(cpu, "CHUNK_NUMBERS", rows * len(case.encoder))
    selection = cpu.select_batch_topk(case.x, case.encoder, case.bias, count)
    check_selection(selection, case, 1e-12)
    torch.testing.assert_close(selection.values.sort().values, whole.values.sort().values, rtol=1e-12, atol=1e-12)
    per_row = cpu.select_topk(case.x, case.encoder, case.bias, case.k)
    check_selection(per_row, case, 1e-12)


def test_a_chunk_that_holds_more_than_its_share_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is selected stands in one chunk, the last, whose bound from its own share is far too high."""
    generator = torch.Generator().manual_seed(0)
    x, encoder = torch.randn(16, 8, generator=generator), torch.randn(2048, 8, generator=generator)
    x[12:] *= 50
    case = Case(x, encoder, torch.zeros(2048), 4)
    monkeypatch.setattr(cpu, "CHUNK_NUMBERS", 4 * 2048)
    made = []
    chunks = cpu._chunks
    monkeypatch.setattr(cpu, "_chunks", lambda x, *rest: made.append(len(x)) or chunks(x, *rest))
    selection = cpu.select_batch_topk(x, encoder, case.bias, 64)
    assert made == [16, 4], "the case is not the one meant"
    expected = (x @ encoder.T).flatten().topk(64).values
    torch.testing.assert_close(selection.values.sort().values, expected.sort().values)
    assert selection.pattern.rows.min() >= 12


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_numpy_s_product_is_torch_s(monkeypatch: pytest.MonkeyPatch, transposed: bool, threads: int) -> None:
    monkeypatch.setattr(products, "_onednn_beats_openblas", lambda: False)
    monkeypatch.setattr(products, "_openblas_beats_mkl", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, encoder = torch.randn(96, 400), torch.randn(1000, 400)
    if transposed:
        encoder = encoder.T.contiguous().T
    assert products._numpy_is_faster(x, encoder)
    assert not products._numpy_is_faster(x.double(), encoder.double())
    assert not products._numpy_is_faster(x[:2], encoder), "too small to be worth it"
    expected = x.double() @ encoder.double().T
    out = torch.empty(96, 1000)
    assert products.product(x, encoder, out) is out
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(products.product(x, encoder).double(), expected, rtol=1e-4, atol=1e-3)
    by_column = x.T.contiguous().T
    torch.testing.assert_close(products.product(by_column, encoder).double(), expected, rtol=1e-4, atol=1e-3)
    with products.one_thread_each():
        assert all(library["num_threads"] == 1 for library in products._openblas().info())
        torch.testing.assert_close(products.tile_product(x, encoder).double(), expected, rtol=1e-4, atol=1e-3)
        shifted = products.tile_product(by_column, encoder, torch.ones(1000))
        torch.testing.assert_close(shifted.double(), expected + 1, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is built without oneDNN")
@pytest.mark.parametrize("transposed", [False, True])
def test_onednn_s_product_is_torch_s(monkeypatch: pytest.MonkeyPatch, transposed: bool) -> None:
    monkeypatch.setattr(products, "_onednn_beats_openblas", lambda: True)
    x, encoder, bias = torch.randn(96, 400), torch.randn(1000, 400, requires_grad=True), torch.randn(1000)
    if transposed:
        encoder = encoder.T.contiguous().T
    assert products.makes_its_own(x, encoder)
    assert not products.makes_its_own(x.double(), encoder.double())
    out = torch.empty(96, 1000)
    assert products.product(x, encoder, out) is out
    exact = (x.double() @ encoder.double().T).detach()
    for found in (out, products.product(x, encoder), products.tile_product(x, encoder.detach())):
        assert not found.requires_grad
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-3)
    for found in (products.affine(x, encoder, bias), products.tile_product(x, encoder.detach(), bias)):
        torch.testing.assert_close(found.double(), exact + bias, rtol=1e-4, atol=1e-3)
    rounded = products.tile_product(x.bfloat16(), encoder.detach().bfloat16())
    assert rounded.dtype is torch.bfloat16
    torch.testing.assert_close(rounded.double(), exact, rtol=0.01, atol=0.5)


def test_the_openblas_that_multiplies_is_numpy_s_own() -> None:
    """Another library's copy, loaded earlier or later, must not decide how a product is made."""
    for library in products._openblas().info():
        assert Path(library["filepath"]).parent.name == "numpy.libs"


@pytest.mark.parametrize("has_its_own", [False, True], ids=["without instructions for it", "on this processor"])
def test_bfloat16_products_are_rounded_once(monkeypatch: pytest.MonkeyPatch, has_its_own: bool) -> None:
    """On every processor: oneDNN has none for those without AVX-512."""
    if not has_its_own:
        monkeypatch.setattr(products, "_onednn_has_bfloat16", lambda: False)
    generator = torch.Generator().manual_seed(0)
    x, encoder = (torch.randn(n, 48, generator=generator).bfloat16() for n in (33, 70))
    bias = torch.randn(70, generator=generator).bfloat16()
    exact = x.double() @ encoder.double().T
    for result, expected in (
        (products.tile_product(x, encoder), exact),
        (products.product(x, encoder), exact),
        (products.tile_product(x, encoder, bias), exact + bias.double()),
    ):
        assert result.dtype == torch.bfloat16
        assert float((result == expected.bfloat16()).float().mean()) > 0.99  # others are within rounding of a half
        torch.testing.assert_close(result.double(), expected, rtol=2**-7, atol=1e-6)
