"""What a CUDA graph does with a step, without a GPU: records every operation and launch, and replays them in place.

As in a capture, recording leaves everything as it was, and an operation that would wait for the device, or whose result
has a size that depends on data, is an error: only those in `CAPTURED` are let through.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_iter, tree_map

CAPTURED = frozenset(
    f"aten.{name}"
    for name in """
    __rshift__.Scalar _foreach_add_.Scalar _fused_adam_.tensor_lr _to_copy.default abs.default add.Tensor
    add_.Tensor addmm.default all.default arange.default bitwise_and.Scalar bitwise_and.Tensor bitwise_not.default
    bitwise_or.Tensor bitwise_or_.Tensor bitwise_xor.Tensor cat.default clamp.default clamp_max.default
    clamp_min.default clamp_min_.default copy_.default cumsum.default detach.default div.Scalar div.Tensor
    empty.memory_format eq.Scalar eq.Tensor exp.default expand.default flip.default floor_divide.default
    full.default ge.Scalar ge.Tensor gt.Scalar gt.Tensor index.Tensor index_add.default index_add_.default
    index_put.default index_put_.default index_select.default isnan.default le.Scalar le.Tensor lerp.Scalar
    linalg_vector_norm.default log.default lt.Scalar lt.Tensor masked_fill.Scalar masked_fill_.Scalar mean.default
    mean.dim min.default mm.default mm.out mul.Scalar mul.Tensor mul_.Tensor mv.default nan_to_num.default
    ne.Scalar neg.default new_empty.default new_empty_strided.default new_ones.default new_zeros.default
    ones_like.default permute.default pow.Tensor_Scalar reciprocal.default relu.default remainder.Scalar
    repeat_interleave.Tensor rsub.Scalar scatter_.src searchsorted.Tensor select.int slice.Tensor
    slice_backward.default sort.default sort.stable sqrt.default squeeze.dim squeeze_.dim stack.default sub.Tensor
    sub_.Tensor
    sum.default sum.dim_IntList t.default take.default threshold_backward.default topk.default unsqueeze.default
    var.correction view.default view.dtype where.self zeros.default
    """.split()
)
"""Operators of a step, each of which is one or more launches on a GPU, of a number and size that shapes determine."""
_SHAPES_ONLY = ("aten.squeeze_.dim", "aten.unsqueeze_.default")
"""Operators that change a tensor in place, but nothing in memory."""


class NotCapturedError(RuntimeError):
    """What CUDA says of an operation that cannot be captured."""


@dataclass
class _Call:
    """An operation or launch, with its tensors."""

    name: str
    run: Callable[..., Any]
    args: Any
    kwargs: Any
    result: Any = None
    is_in_place: bool = False


def _tensors(*trees: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(trees) if isinstance(leaf, Tensor))


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _as_now(tree: Any) -> Any:
    """The same with other tensors for the same memory, whose shapes stay as they are when operations change them."""
    with _disable_current_modes():
        return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


class Recording(TorchDispatchMode):
    """Operations inside `with`, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self._created: dict[int, int] = {}
        self._memory: list[torch.UntypedStorage] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        is_mask = "index" in str(func) and any(tensor.dtype is torch.bool for tensor in _tensors(args[1:]))
        if str(func) not in CAPTURED or is_mask:
            raise NotCapturedError(f"{func}: operation not permitted when stream is capturing")
        self._remember(args, kwargs)
        call = _Call(str(func), func, *_as_now((args, kwargs)), is_in_place=func._schema.is_mutable)
        result = func(*args, **kwargs)
        call.result = _as_now(result)
        self._add(call)
        return result

    def launch(self, name: str, run: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Record a launch of a kernel, and run it."""
        self._remember(args, kwargs)
        run(*args, **kwargs)
        self._add(_Call(name, run, *_as_now((args, kwargs)), is_in_place=True))

    def operation(self, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a function of tensors as one operation, and run it; it changes its arguments if it returns nothing."""
        self._remember(args, kwargs)
        with _disable_current_modes():
            result = run(*args, **kwargs)
        self._add(_Call(run.__name__, run, *_as_now((args, kwargs, result)), is_in_place=result is None))
        return result

    def _add(self, call: _Call) -> None:
        known = {_place(tensor) for tensor in _tensors(call.args, call.kwargs)}
        for tensor in _tensors(call.result):
            if _place(tensor) not in known and _place(tensor) not in self._created:
                self._created[_place(tensor)] = len(self._created)
                self._memory.append(tensor.untyped_storage())
        self.calls.append(call)

    def _remember(self, *trees: Any) -> None:
        """Keep what older tensors hold, before the first operation that reads or writes them."""
        with _disable_current_modes():
            for tensor in _tensors(*trees):
                place = _place(tensor)
                if place not in self._created and place not in self._before:
                    storage = tensor.untyped_storage()
                    self._before[place] = storage, storage.clone()

    def undo(self) -> None:
        """Give older tensors what they held before."""
        for storage, before in self._before.values():
            storage.copy_(before)

    def replay(self) -> None:
        """Do everything again, with the same tensors."""
        with torch.no_grad():
            for call in self.calls:
                inputs = {_place(tensor) for tensor in _tensors(call.args, call.kwargs)}
                if call.name in _SHAPES_ONLY:
                    continue
                if call.is_in_place:
                    call.run(*call.args, **call.kwargs)
                elif any(_place(tensor) not in inputs for tensor in _tensors(call.result)):
                    again = call.run(*call.args, **call.kwargs)
                    for old, new in zip(_tensors(call.result), _tensors(again), strict=True):
                        old.copy_(new)

    def forget(self) -> None:
        """Overwrite what was created, as the next step of another graph with the same memory does."""
        for storage in self._memory:
            storage.fill_(255)  # pyright: ignore[reportAttributeAccessIssue]

    def signature(self) -> list[tuple[Any, ...]]:
        """The calls with all their numbers; tensors by place, or by the order in which they were created."""

        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return repr(value)
            place = _place(value)
            where = ("created", self._created[place]) if place in self._created else ("older", place)
            return (*where, value.storage_offset(), tuple(value.shape), value.stride(), value.dtype)

        return [
            (call.name, *(leaf(value) for value in tree_flatten((call.args, call.kwargs, call.result))[0]))
            for call in self.calls
        ]


_OPEN: list[Recording] = []


@contextlib.contextmanager
def recorded() -> Iterator[Recording]:
    """Record what is done inside `with`, then undo it."""
    recording = Recording()
    _OPEN.append(recording)
    try:
        with recording:
            yield recording
    finally:
        _OPEN.remove(recording)
        recording.undo()


def launches_recorded(monkeypatch: Any) -> None:
    """Launches of Triton's interpreter are recorded, and are one operation each."""
    from triton.runtime.interpreter import InterpretedFunction

    plain = InterpretedFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        def launched(*args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():
                plain(self, *args, grid=grid, warmup=warmup, **kwargs)

        if _OPEN:
            _OPEN[-1].launch(f"{self.fn.__name__}{tuple(grid)}", launched, args, kwargs)
        else:
            launched(*args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", run)


def one_operation(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: a function of tensors that is recorded as one operation, whatever it does."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return _OPEN[-1].operation(function, args, kwargs) if _OPEN else function(*args, **kwargs)

    return called


@dataclass
class SimulatedGraph:
    """`torch.cuda.CUDAGraph` on a CPU."""

    replays: int = 0
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __post_init__(self) -> None:
        self.recording = self._stack.enter_context(recorded())

    def capture_end(self) -> None:
        self._stack.close()

    def replay(self) -> None:
        self.replays += 1
        self.recording.replay()
