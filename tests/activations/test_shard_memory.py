"""One shard, filled batch by batch: what is stored, its sums, and what is not finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sae.activations.shard_memory import ShardMemory

HOOK, ROWS, D_IN = "blocks.0.hook_resid_pre", 100, 24
DTYPES = ["float32", "float16", "bfloat16", "int8"]


def batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The rows of a shard, in batches of different lengths; a row of zeros, and rows of very different lengths."""
    x = torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, ROWS)[:, None]
    x[7] = 0
    return list(x.to(dtype).split((32, 32, 32, 4)))


def counted(batch: Tensor) -> Tensor:
    """The rows that count: not the first of each eight."""
    return (torch.arange(len(batch)) % 8).nonzero().flatten()


def fill(memory: ShardMemory, parts: list[Tensor], device: str = "cpu") -> ShardMemory:
    memory.begin(sum(map(len, parts)))
    start = 0
    for part in parts:
        memory.add(HOOK, start, part.to(device), counted(part).to(device))
        start += len(part)
    memory.end()
    return memory


def on_cpu(dtype: str, rows: int = ROWS) -> ShardMemory:
    return ShardMemory(rows, {HOOK: D_IN}, dtype, torch.device("cpu"))


@pytest.mark.parametrize("model_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_stored(dtype: str, model_type: torch.dtype) -> None:
    """The nearest number of the type; for int8, the row's largest is 127 scales."""
    parts = batches(model_type)
    memory = fill(on_cpu(dtype), parts)
    memory.wait()
    stored, x = memory.tensors(HOOK), torch.cat(parts)
    assert memory.is_finite(HOOK)
    if dtype != "int8":
        assert torch.equal(stored["activations"], x.to(getattr(torch, dtype)))
        return
    scale = (x.abs().amax(1).float() / 127).clamp_min(torch.finfo(torch.float32).tiny)
    assert torch.equal(stored["scale"], scale)
    assert torch.equal(stored["activations"].float(), (x / scale[:, None]).round())
    assert stored["activations"].dtype == torch.int8
    assert set(stored["activations"].abs().amax(1).tolist()) == {0, 127}


def test_sums_are_those_of_the_model_s_numbers_in_float64() -> None:
    """In the order of the batches, whatever is stored; only of rows that count, and none in a split without sums."""
    parts = batches()
    memory = fill(on_cpu("int8"), parts)
    total, squares, number = memory.sums(HOOK)
    rows = [part[counted(part)].double() for part in parts]
    assert number == sum(map(len, rows)) == 87
    assert torch.equal(total, sum(x.sum(0) for x in rows))
    assert squares == sum(float(x.square().sum()) for x in rows)
    torch.testing.assert_close(total, torch.cat(rows).sum(0), rtol=1e-13, atol=1e-13)
    memory.begin(32)
    memory.add(HOOK, 0, parts[0], None)
    memory.end()
    assert memory.sums(HOOK)[1:] == (0.0, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_found(dtype: str, bad: float) -> None:
    """In any row, whether it counts or not; and not in the next shard in the same memory."""
    memory = on_cpu(dtype)
    for row in (0, 13, 99):
        parts = batches()
        parts[row // 32][row % 32, 5] = bad
        assert not fill(memory, parts).is_finite(HOOK)
    assert fill(memory, batches()).is_finite(HOOK)


def test_overflow_of_the_stored_type_is_found() -> None:
    parts = batches()
    parts[1][3, 3] = 70_000
    assert not fill(on_cpu("float16"), parts).is_finite(HOOK)
    assert fill(on_cpu("bfloat16"), parts).is_finite(HOOK)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_stores_the_same_and_waits_for_nothing(dtype: str) -> None:
    """Twice in the same memory; PyTorch reports every wait of the host for the device."""
    parts = batches()
    expected = fill(on_cpu(dtype), parts)
    memory = ShardMemory(ROWS, {HOOK: D_IN}, dtype, torch.device("cuda"))
    for _ in range(2):
        on_device = [(part.cuda(), counted(part).cuda()) for part in parts]
        memory.begin(ROWS)
        torch.cuda.set_sync_debug_mode("error")
        try:
            start = 0
            for part, rows in on_device:
                memory.add(HOOK, start, part, rows)
                start += len(part)
            memory.end()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        memory.wait()
        ours, theirs = memory.tensors(HOOK), expected.tensors(HOOK)
        assert ours["activations"].is_pinned()
        for name, tensor in theirs.items():
            if dtype == "int8":  # a division may be rounded differently
                atol = 0.0 if name == "scale" else 1.0
                torch.testing.assert_close(ours[name].float(), tensor.float(), rtol=1e-6, atol=atol)
            else:
                assert torch.equal(ours[name], tensor)
        assert memory.is_finite(HOOK)
        for x, y in zip(memory.sums(HOOK), expected.sums(HOOK), strict=True):
            torch.testing.assert_close(torch.as_tensor(x), torch.as_tensor(y), rtol=1e-12, atol=1e-12)
