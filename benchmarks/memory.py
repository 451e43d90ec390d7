"""What one training step allocates on the GPU path, counted without a GPU.

    python benchmarks/memory.py

The steps run with the Triton back end on CPU tensors of the full size, the kernels' launches left out: every tensor is
made as on a GPU, and PyTorch's allocator says how many bytes live at once. What the kernels would have written is
zeros, and for BatchTopK places spread evenly; sizes do not depend on values. Not counted: the context and workspaces
of CUDA, and the allocator's rounding. A step with dead features is counted too, since AuxK copies their
rows. On a GPU, `benchmarks/training.py --device cuda` measures the peak itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import report
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from sae.architectures import ARCHITECTURES
from sae.dictionary.base import Dictionary
from sae.kernels import back_end, sparse
from sae.kernels.triton import rows as rows_kernels
from sae.kernels.triton import strategies
from sae.training import optimizer as optimizer_module
from sae.training.firing import FiringRecord
from sae.training.objectives import OBJECTIVES, StepInputs
from sae.training.optimizer import FeatureAdam

L2_CACHE = 50 * 1024**2
"""An H100's, which decides the size of the buffer for the encoder's product."""
_EMPTY = (torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default)


class _Zeros(TorchDispatchMode):
    """What a kernel would fill is 0 instead of whatever memory held, so that places in it are valid."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.zero_() if func in _EMPTY else result


def _launch(self: JITFunction, *args: Any, **kwargs: Any) -> None:
    """Instead of a kernel: BatchTopK's finds as many places as there is room for, in the last buffer of rows."""
    if self.fn.__name__ == "_append_from_buffer_kernel":
        totals, values, places, first_row, rows, d_sae = args[3:9]
        totals.fill_(len(places))
        values.zero_()
        torch.arange(len(places), out=places).mul_((first_row + rows) * d_sae // len(places))


def count(architecture: str, dead_share: float, arguments: argparse.Namespace) -> dict[str, float]:
    """Bytes that stay between steps, and the most that live during one."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        dictionary = ARCHITECTURES[architecture](arguments.d_in, arguments.d_sae, **{"k": arguments.k})
        optimizer = FeatureAdam(dictionary, 0.9, 0.999, low_precision=True)
        firing = FiringRecord(arguments.d_sae, 1, torch.device("cpu"))
        firing.silent_tokens[: int(dead_share * arguments.d_sae)] = 1
        firing.candidates = firing.dead.nonzero().flatten()
        x = torch.zeros(arguments.batch, arguments.d_in)
        with torch.profiler.record_function("step"), _Zeros():
            step(dictionary, optimizer, firing, x, arguments.k)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    memory = sorted((event for event in trace if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    start = next(event["ts"] for event in trace if event.get("name") == "step" and event.get("ph") == "X")
    live, between, peak = 0, 0, 0
    for event in memory:
        live += event["args"]["Bytes"]
        between, peak = (live, 0) if event["ts"] < start else (between, max(peak, live))
    return {"between": between, "peak": peak}


def step(dictionary: Dictionary, optimizer: FeatureAdam, firing: FiringRecord, x: torch.Tensor, k: int) -> None:
    """As `sae.train` takes it."""
    context = StepInputs(
        firing.dead, firing.candidates, 0.0, 1.0, k, firing.density,
        optimizer.encoder_sink, optimizer.decoder_sink, optimizer.encoder_bf16,
    )  # fmt: skip
    losses = OBJECTIVES[dictionary.architecture](dictionary, x, x, context)
    losses.total.backward()
    optimizer.step(1e-3)
    firing.record(losses.counts, losses.l0, len(x), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=131_072)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--dead", type=float, nargs="+", default=[0.0, 0.1], help="shares of the features")
    parser.add_argument("--name", default="memory", help="of the files in docs/results/")
    arguments = parser.parse_args()
    dense = 4 * arguments.batch * arguments.d_sae
    cells, rows = [], []
    with (
        mock.patch.object(sparse, "kernels_for", lambda weights: back_end("triton")),
        mock.patch.object(optimizer_module, "kernels_for", lambda weights: back_end("triton")),
        mock.patch.object(JITFunction, "run", _launch),
        mock.patch.object(strategies, "is_interpreted", lambda x: False),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=L2_CACHE)),
        mock.patch.object(rows_kernels, "multiply", lambda *args: None),
    ):
        for architecture in ("topk", "batch_topk"):
            for share in arguments.dead:
                found = count(architecture, share, arguments)
                rows.append({"architecture": architecture, "dead_share": share, **found})
                of_step = found["peak"] - found["between"]
                cells.append(
                    [
                        architecture,
                        f"{share:.0%}",
                        f"{found['between'] / 1e9:.2f}",
                        f"{found['peak'] / 1e9:.2f}",
                        f"{of_step / 1e9:.2f}",
                        f"{of_step / dense:.2f}",
                    ]
                )
    head = [
        "architecture", "dead features", "between steps, GB", "peak, GB", "of the step itself, GB",
        "÷ one float32 [batch, d_sae]",
    ]  # fmt: skip
    shape = (
        f"d_in {arguments.d_in}, d_sae {arguments.d_sae:,}, batch {arguments.batch:,}, k {arguments.k}; weights and "
        f"moments in float32, the encoder also in bfloat16. One float32 [batch, d_sae] would be {dense / 1e9:.2f} GB."
    )
    text = f"{shape}\n\n{report.table(head, cells)}"
    report.write(
        arguments.name, "Memory of a step on the GPU path, counted without a GPU", text, {"rows": rows},
        report.machine(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
