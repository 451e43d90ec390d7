"""Single operations of a training step on this machine, each beside other ways to do the same.

    python benchmarks/operations.py
    python benchmarks/operations.py --device cuda --batch 8192
    python benchmarks/operations.py --device cuda --shapes --name selections-cuda

On a GPU, selections are timed with each strategy of `sae/kernels/triton/strategies.py`, and with `--shapes` at many
shapes and sizes of the buffer, to choose between them; replayed as a CUDA graph, as in training. On a CPU
there is a last table, the crossover between sparse and dense products, from which `kernels.interface.DENSE_ABOVE`
comes. Results go to `docs/results/`.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from unittest import mock

import report
import torch
from ceilings import synchronise
from torch import Tensor

from sae.kernels import cpu, kernels_for, reference
from sae.kernels.interface import AdamStep, FactoredGradient, Gradient, Moments, Subset
from sae.kernels.pattern import Pattern


@dataclass(frozen=True)
class Row:
    """An operation, and the medians of our way to do it and of another in milliseconds."""

    operation: str
    ours: float
    other: float
    other_is: str


@dataclass(frozen=True)
class Operands:
    """A step's tensors: those of the matrices are `[d_sae, d_in]`, the encoder once more in the products' type."""

    x: Tensor
    encoder: Tensor
    decoder: Tensor
    bias: Tensor
    low: Tensor
    k: int

    @staticmethod
    def random(arguments: argparse.Namespace) -> Operands:
        generator = torch.Generator().manual_seed(0)
        device, d_in, d_sae = arguments.device, arguments.d_in, arguments.d_sae
        x = torch.randn(arguments.batch, d_in, generator=generator).to(device)
        encoder = (torch.randn(d_sae, d_in, generator=generator) / d_in**0.5).to(device)
        decoder = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1).to(device)
        low = encoder if device == "cpu" else encoder.bfloat16()
        return Operands(x, encoder, decoder, torch.zeros(d_sae, device=device), low, arguments.k)


class Clock:
    """Times on a device; the median over the repeats, after one to warm up.

    On a GPU, `is_replayed` times the replay of a CUDA graph, as training does, so that launches do not count.
    """

    def __init__(self, device: str, repeats: int, *, is_replayed: bool = False) -> None:
        self.device, self.repeats, self.is_replayed = device, repeats, is_replayed and device != "cpu"

    def milliseconds(self, function: Callable[[], object]) -> float:
        if self.is_replayed:
            graph = torch.cuda.CUDAGraph()
            function()
            with torch.cuda.graph(graph):
                function()
            function = graph.replay
        times = []
        for _ in range(self.repeats + 1):
            synchronise(self.device)
            start = time.perf_counter()
            function()
            synchronise(self.device)
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times[1:])

    def row(self, name: str, ours: Callable[[], object], other: Callable[[], object], other_is: str) -> Row:
        return Row(name, self.milliseconds(ours), self.milliseconds(other), other_is)


@contextlib.contextmanager
def using(strategy: str | None, buffer_per_l2: float | None = None) -> Iterator[None]:
    """Select with a strategy of Triton's back end, and with a buffer of this size; None: as the package does."""
    if strategy is None:
        yield
        return
    from sae.kernels.triton import strategies

    chosen = dict.fromkeys(strategies.STRATEGIES, ((0, strategy),))
    size = strategies.BUFFER_PER_L2 if buffer_per_l2 is None else buffer_per_l2
    with (
        mock.patch.object(strategies, "STRATEGIES", chosen),
        mock.patch.object(strategies, "BUFFER_PER_L2", size),
    ):
        yield


def selections(operands: Operands, clock: Clock) -> list[Row]:
    """Selections; on a GPU with each strategy."""
    rows = []
    for strategy in (None,) if clock.device == "cpu" else ("buffered", "fused"):
        with using(strategy):
            found = selections_as_chosen(operands, clock)
        rows += [replace(row, operation=row.operation + (f" ({strategy})" if strategy else "")) for row in found]
    return rows


def selections_as_chosen(operands: Operands, clock: Clock) -> list[Row]:
    """The encoder's product and what is selected from it; AuxK's selection among a tenth of the features beside it."""
    kernels = kernels_for(operands.encoder)
    bias, k, count = operands.bias, operands.k, operands.k * len(operands.x)
    x, encoder = operands.x.to(operands.low.dtype), operands.low
    dead = torch.arange(0, len(encoder), 10, device=x.device)
    subset = Subset(dead, torch.zeros(len(dead), device=x.device), x.shape[1] // 2)

    def plain_subset() -> object:
        pre = x @ encoder.T
        return pre.topk(k, sorted=False), pre[:, dead].topk(subset.k, sorted=False)

    return [
        clock.row(
            "encode and select, TopK",
            lambda: kernels.select_topk(x, encoder, bias, k),
            lambda: (x @ encoder.T).topk(k, sorted=False),
            "mm, topk",
        ),
        clock.row(
            "encode and select, BatchTopK",
            lambda: kernels.select_batch_topk(x, encoder, bias, count),
            lambda: (x @ encoder.T).flatten().topk(count, sorted=False),
            "mm, topk of all",
        ),
        clock.row(
            "encode and select, TopK, and AuxK among a tenth",
            lambda: kernels.select_topk(x, encoder, bias, k, subset),
            plain_subset,
            "mm, topk twice",
        ),
    ]


SHAPES = [
    (512, 6144, 2048, 16),
    (768, 6144, 2048, 32),
    (768, 24576, 2048, 32),
    (768, 24576, 8192, 32),
    (768, 24576, 8192, 128),
    (768, 131072, 4096, 32),
    (2048, 16384, 4096, 64),
    (2048, 65536, 8192, 64),
    (4096, 32768, 4096, 64),
    (4096, 131072, 16384, 128),
]
"""d_in, d_sae, batch, k."""
BUFFERS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Sizes of the buffer relative to the L2 cache."""


def by_shape(clock: Clock) -> tuple[str, list[dict[str, float | str]]]:
    """Every strategy and size of the buffer at every shape, beside the product and topk of it."""
    records = [record for shape in SHAPES for record in of_shape(clock, *shape)]
    cells = [[value if isinstance(value, str) else f"{value:.2f}" for value in record.values()] for record in records]
    return report.table(list(records[0]), cells), records


def of_shape(clock: Clock, d_in: int, d_sae: int, batch: int, k: int) -> list[dict[str, float | str]]:
    """Milliseconds of TopK's and BatchTopK's selections."""
    operands = Operands.random(argparse.Namespace(device=clock.device, d_in=d_in, d_sae=d_sae, batch=batch, k=k))
    kernels, low = kernels_for(operands.encoder), operands.low
    x, count = operands.x.to(low.dtype), k * batch
    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "TopK": (
            lambda: kernels.select_topk(x, low, operands.bias, k),
            lambda: (x @ low.T).topk(k, sorted=False),
        ),
        "BatchTopK": (
            lambda: kernels.select_batch_topk(x, low, operands.bias, count),
            lambda: (x @ low.T).flatten().topk(count, sorted=False),
        ),
    }
    records = []
    for name, (ours, other) in calls.items():
        record: dict[str, float | str] = {
            "shape": f"{name}, {d_in} → {d_sae:,}, batch {batch:,}, k {k}",
            "product": clock.milliseconds(lambda: x @ low.T),
            "product, topk": clock.milliseconds(other),
        }
        with using("fused"):
            record["fused"] = clock.milliseconds(ours)
        for size in BUFFERS:
            with using("buffered", size):
                record[f"buffered, {size:g} · L2"] = clock.milliseconds(ours)
        records.append(record)
    return records


def products_with_codes(operands: Operands, pattern: Pattern, values: Tensor, clock: Clock) -> list[Row]:
    """Decoding, the gradient of the codes, the gradient of a matrix: ours, dense, and other sparse ways."""
    x, decoder, kernels = operands.x, operands.decoder, kernels_for(operands.encoder)
    term = FactoredGradient(pattern, values, x)
    features = pattern.features.view(len(x), -1)

    def gathered() -> Tensor:
        parts = zip(features.split(256), x.split(256), strict=True)
        return torch.cat([(decoder[chosen] * rows[:, None]).sum(-1) for chosen, rows in parts])

    def by_csr() -> Tensor:
        order, rows, offsets = Pattern(pattern.features, pattern.offsets, pattern.d_sae, pattern.k).by_feature
        matrix = torch.sparse_csr_tensor(offsets, rows, values[order], size=(pattern.d_sae, len(x)))
        return matrix @ x

    def sums() -> Tensor:  # a new pattern, so that sorting it by feature counts
        fresh = Pattern(pattern.features, pattern.offsets, pattern.d_sae, pattern.k)
        return kernels.feature_sums(FactoredGradient(fresh, values, x))

    ours_decode = lambda: kernels.decode(pattern, values, decoder)  # noqa: E731
    ours_dots = lambda: kernels.sampled_product(pattern, x, decoder)  # noqa: E731
    dense_decode = lambda: reference.decode(pattern, values, decoder)  # noqa: E731
    dense_dots = lambda: reference.sampled_product(pattern, x, decoder)  # noqa: E731
    return [
        clock.row("decode", ours_decode, dense_decode, "dense product"),
        clock.row("gradient of the codes", ours_dots, dense_dots, "dense product"),
        clock.row("gradient of the codes", ours_dots, gathered, "gather, multiply, sum"),
        clock.row("gradient of a matrix", sums, lambda: reference.feature_sums(term), "dense product"),
        clock.row("gradient of a matrix", sums, by_csr, "torch.sparse CSR product"),
    ]


def update(operands: Operands, pattern: Pattern, values: Tensor, clock: Clock) -> Row:
    """What is done to the decoder after the backward pass."""
    decoder, kernels = operands.decoder.clone(), kernels_for(operands.encoder)
    term = FactoredGradient(pattern, values, operands.x)
    moments = Moments(torch.zeros_like(decoder), torch.zeros_like(decoder))
    parameter = torch.nn.Parameter(decoder.clone())
    adam = torch.optim.Adam([parameter], fused=True)

    def dense() -> None:
        parameter.grad = reference.feature_sums(term)
        parameter.grad -= (parameter.grad * parameter.data).sum(1, keepdim=True) * parameter.data
        adam.step()
        parameter.data /= parameter.data.norm(dim=1, keepdim=True)

    step = AdamStep(1e-4, 0.9, 0.999, 1e-8, 1, True)
    return clock.row(
        "decoder: gradient, projection, Adam, renormalisation",
        lambda: kernels.adam_(decoder, moments, Gradient((term,)), step),
        dense,
        "dense gradient, fused Adam",
    )


def crossover(batch: int, d_in: int, columns: int, clock: Clock) -> list[Row]:
    """Decoding, the gradient of the codes and that of the decoder, at rising density; ours is the sparse way."""
    rows = []
    generator = torch.Generator().manual_seed(0)
    decoder, x = torch.randn(columns, d_in, generator=generator), torch.randn(batch, d_in, generator=generator)
    chosen = cpu.DENSE_ABOVE
    for share in (1 / 64, 1 / 32, 1 / 16, 1 / 12, 1 / 8, 1 / 4):
        k = max(1, round(share * columns))
        indices = torch.rand(batch, columns, generator=generator).topk(k, sorted=False).indices
        values = torch.rand(batch * k, generator=generator)

        def both(density: float, indices: Tensor = indices, values: Tensor = values) -> None:
            cpu.DENSE_ABOVE = density
            pattern = Pattern.from_indices(indices, columns)
            cpu.decode(pattern, values, decoder)
            cpu.sampled_product(pattern, x, decoder)
            cpu.feature_sums(FactoredGradient(pattern, values, x))

        what = f"all three products at density {share:.3f}"
        rows.append(clock.row(what, lambda both=both: both(2.0), lambda both=both: both(0.0), "dense products"))
    cpu.DENSE_ABOVE = chosen
    return rows


def markdown(rows: list[Row], title: str) -> str:
    """The table."""
    cells = [
        [row.operation, f"{row.ours:,.2f}", row.other_is, f"{row.other:,.2f}", f"{row.other / row.ours:.1f}"]
        for row in rows
    ]
    return f"## {title}\n\n" + report.table(["operation", "ours, ms", "other way", "ms", "other ÷ ours"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=24576)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--columns", type=int, default=2048, help="features in the table of the crossover")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shapes", action="store_true", help="only selections, at many shapes; on a GPU")
    parser.add_argument("--name", help="of the files in docs/results/; default: operations-DEVICE")
    arguments = parser.parse_args()
    clock = Clock(arguments.device, arguments.repeats)
    replaying = Clock(arguments.device, arguments.repeats, is_replayed=True)
    if arguments.shapes:
        with torch.no_grad():
            text, records = by_shape(replaying)
        name = arguments.name or f"selections-{arguments.device}"
        report.write(name, "Selections by shape, ms", text, {"rows": records}, report.machine(arguments.device))
        return
    operands = Operands.random(arguments)
    with torch.no_grad():
        selection = kernels_for(operands.encoder).select_topk(
            operands.x.to(operands.low.dtype), operands.low, operands.bias, operands.k
        )
        first = selections(operands, replaying)
        first += products_with_codes(operands, selection.pattern, selection.values, clock)
        first.append(update(operands, selection.pattern, selection.values, clock))
    shape = f"d_in {arguments.d_in}, d_sae {arguments.d_sae:,}, batch {arguments.batch:,}, k {arguments.k}"
    text, tables = markdown(first, shape), {"operations": [asdict(row) for row in first]}
    if arguments.device == "cpu":
        second = crossover(arguments.batch, arguments.d_in, arguments.columns, clock)
        text += "\n" + markdown(second, f"Sparse against dense, d_in {arguments.d_in}, {arguments.columns:,} features")
        tables["crossover"] = [asdict(row) for row in second]
    name, title = arguments.name or f"operations-{arguments.device}", f"Single operations, {arguments.device.upper()}"
    report.write(name, title, text, tables, report.machine(arguments.device))


if __name__ == "__main__":
    main()
