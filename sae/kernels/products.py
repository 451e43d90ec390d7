"""The one large product of a sparse step, x · encoderᵀ, by the fastest exact routine this machine has."""

from __future__ import annotations

import contextlib
import platform
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_CPU_INFO = Path("/proc/cpuinfo")
_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
_WORTH_IT = 1 << 24


def product(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    out: Float[Tensor, "batch d_sae"] | None = None,
) -> Float[Tensor, "batch d_sae"]:
    """x · encoderᵀ, in `out` if given. Not differentiable."""
    if makes_its_own(x, encoder):
        result = tile_product(x.detach(), encoder.detach())
        return result if out is None else out.copy_(result)
    if out is None:
        out = x.new_empty(len(x), len(encoder))
    if _lacks_bfloat16(x):
        return out.copy_(_product_of_float32(x.detach(), encoder.detach()))
    if _numpy_is_faster(x, encoder):
        _numpy_product(x.detach(), encoder.detach(), out)
        return out
    return torch.mm(x, encoder.T, out=out) if out.dtype == x.dtype else out.copy_(x @ encoder.T)


def affine(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    memory: Float[Tensor, "batch d_sae"] | None = None,
) -> Float[Tensor, "batch d_sae"]:
    """x · encoderᵀ + bias in the bias's type. Not differentiable.

    Args:
        memory: overwritten by the result, unless the product `makes_its_own`.
    """
    if makes_its_own(x, encoder):
        return tile_product(x.detach(), encoder.detach(), bias.detach())
    return product(x, encoder, bias.new_empty(len(x), len(encoder)) if memory is None else memory).add_(bias)


def tile_product(
    x: Float[Tensor, "rows d_in"],
    encoder: Float[Tensor, "columns d_in"],
    bias: Float[Tensor, " columns"] | None = None,
) -> Float[Tensor, "rows columns"]:
    """x · encoderᵀ (+ bias) in the type of x, by the routine that is fastest in one thread. Not differentiable.

    It is oneDNN in bfloat16 and on AMD processors with AVX-512, and the OpenBLAS of NumPy's wheel on other AMD
    processors: call it in `one_thread_each` there.
    """
    if _lacks_bfloat16(x):
        return _product_of_float32(x, encoder, bias)
    if makes_its_own(x, encoder) or (x.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()):
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), encoder.contiguous(), bias, "none", [], "")
    if _numpy_is_faster(x, encoder):
        result = x.new_empty(len(x), len(encoder))
        np.matmul(x.numpy(), encoder.numpy().T, out=result.numpy())
    else:
        result = x @ encoder.T
    return result if bias is None else result.add_(bias)


def one_thread_each() -> contextlib.AbstractContextManager[Any]:
    """A context in which threads that call `tile_product` do not get further threads from OpenBLAS."""
    return _openblas().limit(limits=1) if _openblas_beats_mkl() else contextlib.nullcontext()


def makes_its_own(x: Tensor, encoder: Tensor) -> bool:
    """Whether oneDNN takes the product, in memory of its own.

    On AMD processors with AVX-512 it is twice as fast in float32 as torch's MKL and the OpenBLAS of NumPy's wheel,
    which do not use those instructions there.
    """
    return _is_large(x, encoder) and _onednn_beats_openblas()


def _product_of_float32(x: Tensor, encoder: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · encoderᵀ (+ bias) of 16-bit numbers as oneDNN computes it: summed in float32, and rounded at the end."""
    result = x.float() @ encoder.float().T
    return (result if bias is None else result.add_(bias)).to(x.dtype)


def _lacks_bfloat16(x: Tensor) -> bool:
    """Whether a product is in bfloat16 on a processor for which oneDNN has none; torch's takes 7 times as long."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _onednn_has_bfloat16()


def processor() -> str:
    """This machine's processor by name."""
    names = (line.partition(":")[2].strip() for line in _cpu_info().splitlines() if line.startswith("model name"))
    return next(names, platform.processor())


def cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware; elsewhere they are slower than float32."""
    flags = _cpu_info().split()
    return any(flag in flags for flag in _BF16_FLAGS) and torch.backends.mkldnn.is_available()


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices in hardware: GPUs do from Ampere (compute capability 8.0) on."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type != "cpu" or cpu_has_bfloat16()


def _numpy_is_faster(x: Tensor, encoder: Tensor) -> bool:
    """Whether NumPy's OpenBLAS takes the product: on AMD processors it is up to half again as fast as torch's MKL.

    Timing does not decide this, only facts that do not change between a run and its resumption.
    """
    return _is_large(x, encoder) and _openblas_beats_mkl()


def _is_large(x: Tensor, encoder: Tensor) -> bool:
    """Whether a product in float32 on a CPU is worth a call of another library than torch's."""
    is_float32 = x.device.type == "cpu" and x.dtype == encoder.dtype == torch.float32
    return is_float32 and x.numel() * len(encoder) >= _WORTH_IT


def _numpy_product(x: Tensor, encoder: Tensor, out: Tensor) -> None:
    """One thread per share of the features. OpenBLAS gets no threads of its own: those would wait in a busy loop.

    The busy loop would take cores from the operators that follow.
    """
    threads = torch.get_num_threads()
    bounds = [len(encoder) * number // threads for number in range(threads + 1)]
    left, right, result = x.numpy(), encoder.numpy().T, out.numpy()

    def multiply(start: int, stop: int) -> None:
        np.matmul(left, right[:, start:stop], out=result[:, start:stop])

    with _openblas().limit(limits=1):
        if threads == 1:
            multiply(*bounds)
            return
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(multiply, bounds, bounds[1:]))


@cache
def _onednn_has_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def _on_amd() -> bool:
    return "AuthenticAMD" in _cpu_info()


@cache
def _onednn_beats_openblas() -> bool:
    return _on_amd() and "avx512f" in _cpu_info().split() and torch.backends.mkldnn.is_available()


@cache
def _openblas_beats_mkl() -> bool:
    return _on_amd() and torch.backends.mkl.is_available() and len(_openblas().info()) == 1


@cache
def _openblas() -> Any:
    """Control over the threads of the OpenBLAS in NumPy's wheel, whatever other libraries are loaded."""
    from threadpoolctl import ThreadpoolController

    home = Path(np.__file__).parents[1] / "numpy.libs"
    libraries = ThreadpoolController().select(internal_api="openblas")
    paths = [library["filepath"] for library in libraries.info()]
    return libraries.select(
        filepath=[path for path in paths if home.samefile(Path(path).parent)] if home.is_dir() else []
    )


@cache
def _cpu_info() -> str:
    return _CPU_INFO.read_text(encoding="utf-8") if _CPU_INFO.is_file() else platform.processor()
