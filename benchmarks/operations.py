"""Single operations of a training step on this machine's CPU, each beside what it replaces.

    python benchmarks/operations.py --json operations.json --markdown operations.md

The last table is the crossover between sparse and dense products, from which `kernels.interface.DENSE_ABOVE` comes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch

from sae.kernels import cpu, products, reference
from sae.kernels.interface import AdamStep, Gradient, Moments, Term
from sae.kernels.pattern import Pattern


@dataclass(frozen=True)
class Row:
    """An operation, and the medians of both ways to do it in milliseconds."""

    operation: str
    ours: float
    plain: float
    plain_is: str


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median over the repeats, after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def operations(batch: int, d_in: int, d_sae: int, k: int, repeats: int) -> list[Row]:
    """Every operation of a TopK and a BatchTopK step."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, d_in, generator=generator)
    encoder = torch.randn(d_sae, d_in, generator=generator) / d_in**0.5
    decoder = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
    bias = torch.zeros(d_sae)
    selection = cpu.select_topk(x, encoder, bias, k)
    pattern, values = selection.pattern, selection.values
    term, moments = Term(pattern, values, x), Moments(torch.zeros_like(decoder), torch.zeros_like(decoder))
    parameter = torch.nn.Parameter(decoder.clone())
    adam = torch.optim.Adam([parameter], fused=True)

    def dense_update() -> None:
        parameter.grad = reference.feature_sums(term)
        parameter.grad -= (parameter.grad * parameter.data).sum(1, keepdim=True) * parameter.data
        adam.step()
        parameter.data /= parameter.data.norm(dim=1, keepdim=True)

    def selected(count: int | None) -> object:
        pre = x @ encoder.T
        return pre.topk(k, sorted=False) if count is None else pre.flatten().topk(count, sorted=False)

    rows: list[tuple[str, Callable[[], object], Callable[[], object], str]] = [
        ("encoder's product", lambda: products.product(x, encoder), lambda: x @ encoder.T, "torch.mm"),
        ("encode and select, TopK", lambda: cpu.select_topk(x, encoder, bias, k), lambda: selected(None), "mm, topk"),
        (
            "encode and select, BatchTopK",
            lambda: cpu.select_batch_topk(x, encoder, bias, k * batch),
            lambda: selected(k * batch),
            "mm, topk of all",
        ),
        (
            "decode",
            lambda: cpu.decode(pattern, values, decoder),
            lambda: reference.decode(pattern, values, decoder),
            "dense product",
        ),
        (
            "gradient of the codes",
            lambda: cpu.value_gradients(pattern, x, decoder),
            lambda: reference.value_gradients(pattern, x, decoder),
            "dense product",
        ),
        (
            "decoder: gradient, projection, Adam, renormalisation",
            lambda: cpu.adam_(decoder, moments, Gradient((term,)), AdamStep(1e-4, 0.9, 0.999, 1e-8, 1, True)),
            dense_update,
            "dense gradient, fused Adam",
        ),
    ]
    return [
        Row(name, milliseconds(ours, repeats), milliseconds(plain, repeats), what) for name, ours, plain, what in rows
    ]


def crossover(batch: int, d_in: int, columns: int, repeats: int) -> list[Row]:
    """Decoding, the gradient of the codes and that of the decoder, at rising density; ours is the sparse way."""
    rows = []
    generator = torch.Generator().manual_seed(0)
    decoder, x = torch.randn(columns, d_in, generator=generator), torch.randn(batch, d_in, generator=generator)
    for share in (1 / 64, 1 / 32, 1 / 16, 1 / 12, 1 / 8, 1 / 4):
        k = max(1, round(share * columns))
        indices = torch.rand(batch, columns, generator=generator).topk(k, sorted=False).indices
        values = torch.rand(batch * k, generator=generator)

        def both(density: float, indices: torch.Tensor = indices, values: torch.Tensor = values) -> None:
            cpu.DENSE_ABOVE = density
            pattern = Pattern.from_indices(indices, columns)
            cpu.decode(pattern, values, decoder)
            cpu.value_gradients(pattern, x, decoder)
            cpu.feature_sums(Term(pattern, values, x))

        sparse, dense = (milliseconds(lambda at=at: both(at), repeats) for at in (2.0, 0.0))
        rows.append(Row(f"all three products at density {share:.3f}", sparse, dense, "dense products"))
    return rows


def markdown(rows: list[Row], title: str) -> str:
    """The table."""
    lines = [
        f"### {title}",
        "",
        "| operation | ours, ms | plain, ms | plain / ours | plain is |",
        "|---|--:|--:|--:|---|",
    ]
    lines += [
        f"| {row.operation} | {row.ours:.1f} | {row.plain:.1f} | {row.plain / row.ours:.1f} | {row.plain_is} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=24576)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--columns", type=int, default=2048, help="features in the table of the crossover")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    shape = arguments.batch, arguments.d_in, arguments.d_sae, arguments.k
    first = operations(*shape, arguments.repeats)
    second = crossover(arguments.batch, arguments.d_in, arguments.columns, arguments.repeats)
    machine = {
        "date": date.today().isoformat(),
        "processor": products.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    text = "# Single operations, CPU, float32\n\n" + ", ".join(f"{key} {value}" for key, value in machine.items())
    batch, d_in, d_sae, k = shape
    text += "\n\n" + markdown(first, f"d_in {d_in}, d_sae {d_sae:,}, batch {batch:,}, k {k}")
    text += "\n" + markdown(
        second, f"Sparse against dense, d_in {d_in}, {arguments.columns:,} features, batch {batch:,}"
    )
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")
    if arguments.json:
        tables = {"operations": [vars(row) for row in first], "crossover": [vars(row) for row in second]}
        arguments.json.write_text(json.dumps({"machine": machine, **tables}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
