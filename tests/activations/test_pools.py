"""Pools on the host and on a device: the same batches by every way, no row of a damaged shard, memory used again."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae.activations import ActivationCache
from sae.activations.batch_memory import BatchMemory
from sae.activations.joined_rows import JoinedRows
from sae.activations.loader import ActivationLoader
from sae.activations.pools import DevicePools
from sae.activations.shard_rows import ShardRows
from sae.errors import DamagedError
from sae.files.scattered import populate
from tests.support.late_transfer import LateTransfer

HOOK = "blocks.0.hook_resid_pre"
ROWS, CONTEXT = 1003, 8
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]
WriteCache = Callable[..., ActivationCache]


def cache_of(write_cache: WriteCache, dtype: torch.dtype, width: int = 5, **options: Any) -> ActivationCache:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 5, (ROWS,), generator=generator)
    if dtype == torch.int8:
        x = torch.randint(-127, 128, (ROWS, width), generator=generator, dtype=dtype)
        options["scale"] = torch.rand(ROWS, generator=generator) + 0.1
    else:
        x = torch.randn(ROWS, width, generator=generator).to(dtype)
    return write_cache(x, tokens, context_length=CONTEXT, **options)


def loader_of(cache: ActivationCache, **options: Any) -> ActivationLoader:
    return ActivationLoader(cache, HOOK, **{"batch_size": 20, "pool_tokens": 90, "block_tokens": 16, **options})


def batches(loader: ActivationLoader, count: int = 90) -> Tensor:
    """More than two epochs."""
    return torch.stack(list(itertools.islice(loader, count)))


def expected(loader: ActivationLoader, count: int = 90) -> Tensor:
    """The same, from all activations in memory."""
    shards, starts = [], [0]
    for number in range(loader.cache.shards()):
        x, scale = loader.cache.activation_shard(HOOK, "train", number)
        shards.append(x if scale is None else x.float() * scale[:, None])
        starts.append(starts[-1] + len(x))
    order, found, everything = loader.order, [], torch.cat(shards)
    for plan in order.plans(loader.position, loader.streams):
        rows = torch.cat([torch.from_numpy(rows) + starts[number] for number, rows in order.reads(plan)])
        found.append(everything[rows[plan.places.argsort()]][plan.skip :])
        if sum(map(len, found)) >= count * loader.batch_size:
            break
    return torch.cat(found)[: count * loader.batch_size].view(count, loader.batch_size, -1)


def from_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardRows, "is_cached", lambda self, rows: False)


def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Device memory is that of the host, and copies to it are made as late as possible."""
    monkeypatch.setattr(
        ActivationLoader, "_pools", lambda self: DevicePools(self.cache, self.hook, self.order, LateTransfer())
    )


def from_page_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardRows, "is_cached", lambda self, rows: True)


WAYS = [from_page_cache, from_disk, on_device]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch_size", "pool_tokens", "width"), [(20, 90, 5), (7, 10**6, 1), (130, 64, 9)])
def test_every_way_gives_the_same_batches(
    write_cache: WriteCache, monkeypatch: pytest.MonkeyPatch, way: Callable[[pytest.MonkeyPatch], None],
    dtype: torch.dtype, batch_size: int, pool_tokens: int, width: int,
) -> None:  # fmt: skip
    way(monkeypatch)
    loader = loader_of(cache_of(write_cache, dtype, width), batch_size=batch_size, pool_tokens=pool_tokens)
    wanted = expected(loader)
    given = batches(loader)
    assert given.dtype == (torch.float32 if dtype == torch.int8 else dtype)
    assert torch.equal(given, wanted)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("position", [20, 500, 740])
def test_every_way_goes_on_inside_a_pool(
    write_cache: WriteCache, monkeypatch: pytest.MonkeyPatch, way: Callable[[pytest.MonkeyPatch], None], position: int
) -> None:
    way(monkeypatch)
    loader = loader_of(cache_of(write_cache, torch.int8))
    loader.load_state_dict({"position": position, "streams": 2})
    wanted = expected(loader, 40)
    assert torch.equal(batches(loader, 40), wanted)
    assert loader.state_dict() == {"position": position + 800, "streams": 2}


@pytest.mark.parametrize("way", WAYS)
def test_no_row_of_a_damaged_shard_is_given(
    write_cache: WriteCache, monkeypatch: pytest.MonkeyPatch, way: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """A shard is written to in place after an epoch; its inode and its size stay."""
    way(monkeypatch)
    cache = cache_of(write_cache, torch.float32)
    loader = loader_of(cache)
    wanted = expected(loader)
    reader, given = iter(loader), 0
    for batch in itertools.islice(reader, 45):
        assert torch.equal(batch, wanted[given])
        given += 1
    path = cache.path / HOOK / "train-00007.safetensors"
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.write(content[:100] + bytes(byte ^ 255 for byte in content[100:]))
    with pytest.raises(DamagedError, match=r"train-00007.safetensors': damaged or changed"):
        for batch in reader:
            assert torch.equal(batch, wanted[given])
            given += 1
    assert given < 65


@pytest.mark.parametrize("way", WAYS)
def test_a_shard_replaced_by_an_equal_one_is_read_on(
    write_cache: WriteCache, monkeypatch: pytest.MonkeyPatch, way: Callable[[pytest.MonkeyPatch], None]
) -> None:
    way(monkeypatch)
    cache = cache_of(write_cache, torch.float16)
    loader = loader_of(cache)
    wanted = expected(loader)
    reader = iter(loader)
    first = [next(reader) for _ in range(3)]
    path = cache.path / HOOK / "train-00007.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    assert torch.equal(torch.stack([*first, *itertools.islice(reader, 87)]), wanted)


@pytest.mark.parametrize("way", WAYS)
def test_a_shard_is_hashed_once(
    write_cache: WriteCache, monkeypatch: pytest.MonkeyPatch, way: Callable[[pytest.MonkeyPatch], None]
) -> None:
    way(monkeypatch)
    cache = cache_of(write_cache, torch.float16)
    checked: list[str] = []
    original = ActivationCache._check

    def counting(self: ActivationCache, name: str) -> Any:
        checked.append(name)
        return original(self, name)

    monkeypatch.setattr(ActivationCache, "_check", counting)
    loader = loader_of(cache)
    reader = iter(loader)
    for _ in range(45):
        next(reader)
    assert {name for name in checked if HOOK in name} == {f"{HOOK}/train-{n:05}.safetensors" for n in range(32)}
    checked.clear()
    for _ in range(90):
        next(reader)
    assert checked == [], "later epochs look at times and sizes alone"


def test_pools_take_the_memory_that_they_say(write_cache: WriteCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device two pools. On the host as much of the page cache, and memory for a few batches, again and again."""
    cache = cache_of(write_cache, torch.float16)
    loader = loader_of(cache, batch_size=10, pool_tokens=100)
    assert loader.pool_bytes == 2 * 100 * 5 * 2
    taken: list[int] = []
    original = BatchMemory.take

    def counting(self: BatchMemory) -> Tensor:
        batch = original(self)
        taken.append(batch.data_ptr())
        return batch

    monkeypatch.setattr(BatchMemory, "_new_piece", one_batch_a_piece(BatchMemory._new_piece))
    monkeypatch.setattr(BatchMemory, "take", counting)
    for _ in itertools.islice(loader, 300):
        pass
    assert len(taken) >= 300
    assert len(set(taken)) <= 100 // 10 + 3, "those of a pool, and the one that is used"
    on_device(monkeypatch)
    made: list[int] = []
    monkeypatch.setattr(
        LateTransfer, "device_memory", lambda self, *shape, dtype: noted(torch.empty(shape, dtype=dtype), made)
    )
    for _ in itertools.islice(loader, 100):
        pass
    assert sum(size for size in made if size == 1000) == loader.pool_bytes
    int8 = loader_of(cache_of(write_cache, torch.int8), pool_tokens=100)
    assert int8.pool_bytes == 2 * 100 * (5 + 4)


def one_batch_a_piece(original: Callable[..., Any]) -> Callable[..., Any]:
    def new_piece(self: BatchMemory) -> Any:
        self._together = 1
        return original(self)

    return new_piece


def noted(memory: Tensor, sizes: list[int]) -> Tensor:
    sizes.append(memory.nbytes)
    return memory


def test_memory_is_given_again_when_nobody_holds_it() -> None:
    memory = BatchMemory(600, 1000, torch.float16)
    first, second = memory.take(), memory.take()
    place, part = first.data_ptr(), first[5:7]
    assert first.untyped_storage().nbytes() == 600 * 1000 * 2, "saving a batch saves no other"
    assert place % 64 == 0
    del first
    assert memory.take().data_ptr() not in (place, second.data_ptr()), "a part of it is still held"
    del part
    assert memory.take().data_ptr() == place


def test_small_batches_share_a_piece_of_memory_and_nothing_else() -> None:
    memory = BatchMemory(3, 5, torch.float16)
    taken = [memory.take().fill_(number) for number in range(40)]
    assert all((batch == number).all() for number, batch in enumerate(taken))
    assert all(batch.data_ptr() % 64 == 0 for batch in taken)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 64])
def test_rows_of_several_tensors_are_one_array(dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randint(-9, 9, (size, width), generator=generator).to(dtype) for size in (7, 1, 20)]
    joined = JoinedRows([*tensors, tensors[2][3:]])
    rows = [torch.tensor([0, 6, 2]), torch.tensor([0]), torch.tensor([19, 4]), torch.tensor([0, 16])]
    places = torch.cat([torch.from_numpy(joined.places(n, part.numpy())) for n, part in enumerate(rows)])
    wanted = torch.cat([tensor[part] for tensor, part in zip([*tensors, tensors[2][3:]], rows, strict=True)])
    assert torch.equal(joined.tensor.index_select(0, places), wanted)


def populates() -> bool:
    """Whether the system maps and reads rows when it is told to: Linux does from 5.14 on."""
    version = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return sys.platform == "linux" and version is not None and tuple(map(int, version.groups())) >= (5, 14)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the system does not say what is in the page cache")
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("maps", [True, False])
def test_files_are_read_if_the_system_does_not_have_them_in_memory(
    write_cache: WriteCache, monkeypatch: pytest.MonkeyPatch, cached: bool, maps: bool
) -> None:
    """By the system itself, or where it cannot, by requests."""
    loader = loader_of(cache_of(write_cache, torch.bfloat16), pool_tokens=10**6)
    wanted = expected(loader)
    really_read, really_mapped, read, mapped = os.preadv, ShardRows.map, [0], [0]

    def preadv(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags and not cached:
            raise BlockingIOError
        count = really_read(descriptor, buffers, offset)
        read[0] += 0 if flags else count
        return count

    def map_rows(self: ShardRows, rows: Any) -> bool:
        if not maps or not really_mapped(self, rows):
            return False
        mapped[0] += len(rows)
        return True

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(ShardRows, "map", map_rows)
    assert torch.equal(batches(loader), wanted)
    row_bytes, pools = 5 * 2, 3
    fewest = loader.tokens_per_epoch * pools
    assert mapped[0] or cached or not maps or not populates()
    if not cached and mapped[0]:
        assert fewest <= mapped[0] <= loader.tokens_per_epoch * (pools + 1), "the next pool perhaps"
        assert read[0] == 0
    else:
        most = ROWS * (pools + 1)
        assert read[0] == 0 if cached else fewest <= read[0] / row_bytes <= most, "short gaps are read too"
        assert mapped[0] == 0


def test_rows_of_a_file_are_mapped_or_refused(tmp_path: Path) -> None:
    """Whatever the system can do, it says so, and a row behind the end of the file is refused, not crashed on."""
    rows = np.arange(40_000, dtype=np.int16).reshape(-1, 8)
    path = tmp_path / "rows"
    path.write_bytes(rows.tobytes())
    mapping = np.memmap(path, dtype=np.int16, mode="r").reshape(-1, 8)
    address, size = mapping.ctypes.data, mapping.strides[0]
    chosen = np.array([0, 1, 2, 700, 701, 4_999])
    done = populate(address, chosen, size)
    assert np.array_equal(mapping[chosen], rows[chosen])
    assert done or not populates()
    if done:
        os.truncate(path, 4096)
        assert populate(address, np.array([0, 1]), size)
        assert not populate(address, chosen, size)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_gives_the_batches_of_the_cpu(write_cache: WriteCache, dtype: torch.dtype) -> None:
    """While other work holds up the stream that uses them, so that what does not wait is found."""
    cache = cache_of(write_cache, dtype, 64)
    loader = loader_of(cache, device="cuda")
    wanted, work = expected(loader), torch.randn(2048, 2048, device="cuda")
    for batch, right in zip(loader, wanted, strict=False):
        work = torch.tanh(work @ work)
        assert batch.device.type == "cuda"
        assert torch.equal(batch.cpu(), right)
