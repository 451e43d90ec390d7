"""Compiles every kernel for a GPU that need not be there, as the back end's own launches would.

    python -m tests.support.compile_kernels 90

The back end runs on CPU tensors of true widths, and each launch is compiled, with the types, divisibilities and options
of its arguments, instead of run. Prints a line for each: its shared memory and registers, and what spilled.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler import compile as compile_for
from triton.runtime.jit import JITFunction, create_function_from_signature

import sae.kernels.triton as back_end
from sae.kernels.interface import AdamStep, FactoredGradient, Gradient, Moments, RowGradient, Subset
from sae.kernels.triton import batch, rows, strategies, tiles

SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227}
"""Shared memory that a program can have, in KiB."""


class Launches:
    """Compiles what is launched, each combination of a kernel, types, divisibilities and options once."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.target = GPUTarget("cuda", capability, 32)
        self.backend = make_backend(self.target)
        self.most = SHARED[capability] * 1024
        self.seen: set[str] = set()

    def compile(self, function: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        binder = create_function_from_signature(function.signature, function.params, self.backend)
        bound, specialization, options = binder(*args, **kwargs, debug=False)
        kwargs["debug"] = False
        options, signature, constants, attributes = function._pack_args(
            self.backend, kwargs, bound, specialization, options
        )
        key = repr((function.fn.__name__, signature, sorted(constants.items()), attributes, options.num_warps))
        if key in self.seen:
            return
        self.seen.add(key)
        source = ASTSource(function, signature, constants, attributes)
        compiled = compile_for(source, target=self.target, options=options.__dict__)
        names = [parameter.name for parameter in function.params]
        aligned = sum(1 for attribute in attributes.values() if attribute)
        shown = {names[path[0]]: value for path, value in constants.items() if names[path[0]].isupper()}
        shared = compiled.metadata.shared
        print(
            f"{function.fn.__name__} {shown} warps {options.num_warps}: {shared} bytes shared, "
            f"{aligned} of {len(names)} arguments divisible by 16, {usage(compiled.asm['cubin'])}",
            flush=True,
        )
        assert shared <= self.most, f"{function.fn.__name__}: {shared} bytes of shared memory, {self.most} are there"


def usage(cubin: bytes) -> str:
    """Registers and stack of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = dict(word.split(":", 1) for word in text.split() if word.startswith(("REG:", "STACK:")))
    return f"{parts.get('REG')} registers, {parts.get('STACK')} bytes of stack"


def launch_everything(d_in: int, d_sae: int, dtype: torch.dtype, k: int) -> None:
    """Every function of the back end with each strategy, at one shape."""
    x, encoder, bias = torch.randn(64, d_in), torch.randn(d_sae, d_in), torch.zeros(d_sae)
    low, low_encoder = x.to(dtype), encoder.to(dtype)
    dead = torch.arange(0, 2048)
    subset = Subset(dead, torch.zeros(len(dead)), d_in // 2)
    for name in (strategies.BUFFERED, strategies.FUSED):
        with mock.patch.dict(strategies.STRATEGIES, dict.fromkeys(strategies.STRATEGIES, ((0, name),))):
            pattern = back_end.select_topk(low, low_encoder, bias, k, subset).pattern
            back_end.select_batch_topk(low, low_encoder, bias, 64 * k)
            back_end.select_above(x, encoder, bias, bias, 4096)
    pattern.features.copy_(torch.arange(pattern.pairs) % d_sae)
    values, moments = torch.randn(pattern.pairs), Moments(encoder.clone(), encoder.clone())
    back_end.decode(pattern, values, encoder)
    back_end.sampled_product(pattern, x, encoder)
    back_end.column_sums(pattern, values)
    term, block = FactoredGradient(pattern, values, x), RowGradient(dead, encoder[dead])
    back_end.feature_sums(term)
    step = AdamStep(1e-3, 0.9, 0.999, 1e-8, 1, True, torch.ones(()))
    for gradient in (Gradient((term,)), Gradient((term, term), (block,), encoder)):
        back_end.adam_(encoder, moments, gradient, step, encoder.to(torch.bfloat16))
        back_end.gradient_squares(encoder, gradient, False)


def main() -> None:
    launches = Launches(int(sys.argv[1]))

    def run(self: JITFunction[Any], *args: Any, **kwargs: Any) -> None:
        launches.compile(self, *args, **kwargs)

    def never(x: Tensor) -> bool:
        return False

    patches = [mock.patch.object(module, "is_interpreted", never) for module in (batch, rows, strategies, tiles)]
    patches += [
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(rows, "rows_at_once", lambda x, d_sae: 128),
        mock.patch.object(rows, "multiply", lambda *args: None),
        mock.patch.object(tiles, "major", lambda x: launches.capability // 10),
    ]
    for patch in patches:
        patch.start()
    launch_everything(768, 24_576, torch.bfloat16, 32)
    launch_everything(576, 4_608, torch.float32, 128)
    launch_everything(4_096, 16_384, torch.bfloat16, 256)


if __name__ == "__main__":
    main()
