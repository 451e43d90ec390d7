"""Selection on a GPU: the fused kernels compared with PyTorch's product and topk, over shapes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import report
import torch
from gpu_parts import Context, Row
from gpu_timing import medians
from torch import Tensor
from torch.nn.functional import linear

from sae.kernels import back_end
from sae.kernels.interface import Subset


@dataclass(frozen=True)
class Case:
    """A shape; x is `[batch, d_in]`, the encoder `[d_sae, d_in]`."""

    d_in: int
    d_sae: int
    batch: int
    k: int

    def __str__(self) -> str:
        return f"{self.d_in:,} → {self.d_sae:,}, batch {self.batch:,}, k {self.k}"


REAL = (
    Case(768, 24_576, 8192, 32),
    Case(768, 131_072, 8192, 32),
    Case(2304, 65_536, 4096, 64),
    Case(4096, 131_072, 4096, 64),
    Case(768, 6144, 2048, 32),
    Case(512, 6144, 16_384, 16),
    Case(768, 24_576, 16_384, 128),
    Case(4096, 24_576, 2048, 128),
)
DRY = (Case(16, 128, 8, 2),)
RULES = ("TopK", "BatchTopK", "TopK and AuxK", "BatchTopK and AuxK")


def selection(context: Context) -> None:
    """Each case with each rule; AuxK selects d_in / 2 of a tenth of the features, which count as dead."""
    begun = time.monotonic()
    if not context.on_gpu:  # before anything imports Triton
        os.environ["TRITON_INTERPRET"] = "1"
    for case in DRY if context.dry else REAL:
        inputs, encoder, bias = operands(case, context.device, 1 if context.dry else 4)
        for rule in RULES:
            if time.monotonic() - begun > context.seconds - 5:
                return
            seconds = compare(case, rule, inputs, encoder, bias, context)
            context.emit(f"{case} {rule}", {"case": asdict(case), "rule": rule, **seconds})
        del inputs, encoder, bias
        if context.on_gpu:
            torch.cuda.empty_cache()


def operands(case: Case, device: str, count: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Some inputs, encoder and bias; products in bfloat16 on a GPU, as training makes them."""
    generator = torch.Generator(device).manual_seed(0)
    low = torch.float32 if device == "cpu" else torch.bfloat16

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    inputs = [drawn(case.batch, case.d_in).to(low) for _ in range(count)]
    return inputs, (drawn(case.d_sae, case.d_in) / case.d_in**0.5).to(low), 0.1 * drawn(case.d_sae)


def compare(
    case: Case, rule: str, inputs: list[Tensor], encoder: Tensor, bias: Tensor, context: Context
) -> dict[str, float]:
    """Seconds of both ways."""
    kernels, count, low_bias = back_end("triton"), case.k * case.batch, bias.to(encoder.dtype)
    dead = torch.arange(0, case.d_sae, 10, device=encoder.device)
    aux = Subset(dead, torch.zeros(len(dead), device=encoder.device), min(case.d_in // 2, len(dead)))
    subset = aux if "AuxK" in rule else None
    batched = rule.startswith("Batch")

    def fused(x: Tensor) -> object:
        if batched:
            return kernels.select_batch_topk(x, encoder, bias, count, subset)
        return kernels.select_topk(x, encoder, bias, case.k, subset)

    def plain(x: Tensor) -> object:
        pre = linear(x, encoder, low_bias)
        chosen = pre.flatten().topk(count, sorted=False) if batched else pre.topk(case.k, sorted=False)
        return chosen, None if subset is None else pre[:, subset.features].topk(subset.k, sorted=False)

    with torch.no_grad():
        found = medians({"ours": fused, "other": plain}, inputs, context.device, 1 if context.dry else 15)
    return {f"{name}_seconds": seconds for name, seconds in found.items()}


def markdown(rows: Sequence[Row]) -> str:
    """The table; the product alone, 2 · batch · d_in · d_sae operations, gives the rates."""
    cells = []
    for row in rows:
        case = Case(**row["case"])
        operations = 2 * case.batch * case.d_in * case.d_sae
        ours, other = row["ours_seconds"], row["other_seconds"]
        cells.append(
            [
                str(case), row["rule"], f"{1e3 * ours:,.3f}", f"{1e3 * other:,.3f}", f"{other / ours:.2f}",
                f"{operations / ours / 1e12:,.1f}", f"{operations / other / 1e12:,.1f}",
            ]
        )  # fmt: skip
    head = ["shape", "selects", "fused, ms", "mm, topk, ms", "÷ fused", "fused, TFLOP/s", "mm, topk, TFLOP/s"]
    return report.table(head, cells, left=2)
