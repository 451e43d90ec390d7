"""Makes results independent of the PyTorch modes that a caller has set."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Computation = TypeVar("Computation", bound=Callable[..., Any])
_KINDS = ("cpu", "cuda")
"""Device types whose autocast is checked."""
_CPU = torch.device("cpu")
_FUNCTORCH: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def training_mode() -> Iterator[None]:
    """Record gradients in the tensors' dtypes, whatever the caller's modes; restore those modes afterwards.

    Undoes `torch.set_grad_enabled(False)`, `torch.no_grad`, `torch.inference_mode`, `torch.autocast`,
    `torch.set_default_dtype` and `torch.set_default_device`.
    """
    with torch.inference_mode(False), torch.enable_grad(), _own_modes():
        yield


def present_mode() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Capture the current modes; the returned function opens a context that restores them, for the caller's code."""
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    casts = {kind: torch.get_autocast_dtype(kind) for kind in _KINDS if torch.is_autocast_enabled(kind)}
    dtype, device = torch.get_default_dtype(), torch.get_default_device()

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        with (
            torch.inference_mode(inference),
            torch.set_grad_enabled(gradients),
            _autocast(casts),
            defaults(dtype, device),
        ):
            yield

    return again


def without_autocast(computation: Computation) -> Computation:
    """Decorator: compute in the tensors' dtypes even inside `torch.autocast`."""

    @functools.wraps(computation)
    def computed(*args: Any, **kwargs: Any) -> Any:
        if not any(torch.is_autocast_enabled(kind) for kind in _KINDS):
            return computation(*args, **kwargs)
        with _autocast({}):
            return computation(*args, **kwargs)

    return cast(Computation, computed)


def in_own_modes(computation: Computation) -> Computation:
    """Decorator: ignore `torch.autocast`, `set_default_dtype` and `set_default_device` in a function or generator.

    While a generator is suspended at a yield, the caller's modes apply.
    """
    if not inspect.isgeneratorfunction(inspect.unwrap(computation)):
        return _own_modes()(computation)

    @functools.wraps(computation)
    def yielded(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with contextlib.closing(computation(*args, **kwargs)) as values:
            while True:
                with _own_modes():
                    try:
                        value = next(values)
                    except StopIteration:
                        return
                yield value

    return cast(Computation, yielded)


def needs_plain_operators(x: Tensor) -> bool:
    """Whether only PyTorch's own dense operators work.

    This is the case inside the transforms of `torch.func`, in forward-mode differentiation, while `torch.compile` or
    `torch.export` traces, and for tensors without data.
    """
    return (
        torch.compiler.is_compiling()
        or x.device.type == "meta"
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def has_values(x: Tensor) -> bool:
    """Whether a tensor's values can be read: not inside `torch.func.vmap`, nor if it has no data."""
    if x.device.type == "meta":
        return False
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return True
    vmap = _FUNCTORCH.TransformType.Vmap
    return all(level.key() != vmap for level in _FUNCTORCH.get_interpreter_stack() or ())


def is_mapped(gradient: Tensor) -> bool:
    """Whether a backward pass is batched, as in `torch.autograd.grad(…, is_grads_batched=True)`."""
    return torch._C._are_functorch_transforms_active() or _FUNCTORCH.is_legacy_batchedtensor(gradient)


@contextlib.contextmanager
def defaults(dtype: torch.dtype = torch.float32, device: torch.device = _CPU) -> Iterator[None]:
    """Create new tensors with this dtype and on this device inside `with`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device if torch.get_default_device() != device else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _own_modes() -> Iterator[None]:
    with _autocast({}), defaults():
        yield


@contextlib.contextmanager
def _autocast(types: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Cast to these types by type of device; on other types of devices, do not cast."""
    with contextlib.ExitStack() as stack:
        for kind in _KINDS:
            if kind in types or torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, dtype=types.get(kind), enabled=kind in types))
        yield
