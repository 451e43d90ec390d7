"""A model as transformers runs it, with its own attention, read at the inputs and outputs of its modules."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.config.sources import ModelConfig
from sae.model.guard import guarded, quiet
from sae.model.hook_probe import probe_tokens

_CONTEXTS, _LENGTH = 3, 7


def native_model(
    model: Any, device: torch.device, vocabulary: int, config: ModelConfig, *, copied: bool = True
) -> NativeModel | None:
    """A loaded model as transformers runs it; None if it cannot be read, or its weights are to be processed.

    Args:
        model: the Hugging Face model, in evaluation mode.
        device: the device of its tokens.
        vocabulary: number of token ids to choose from.
        config: the configuration that it was loaded with.
        copied: as for `NativeModel`.
    """
    if config.weight_processing != "none":
        return None
    length = min(_LENGTH, getattr(model.config, "max_position_embeddings", None) or _LENGTH)
    try:
        with quiet(), guarded(config):
            return NativeModel(model, probe_tokens(max(1, vocabulary), _CONTEXTS, length, device), copied=copied)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # of a model's own code, too: transformer-lens reads it then, and reports its problems
        return None


def twin_of(model: nn.Module, *, frozen: bool = False) -> Any:
    """A copy of a model's modules that shares its weights.

    Args:
        model: the model.
        frozen: parameters of the copy are objects of their own, on the same memory, and need no gradients.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    if frozen:
        shared |= {id(one): nn.Parameter(one.detach(), requires_grad=False) for one in model.parameters()}
    return copy.deepcopy(model, shared)


@dataclass(frozen=True)
class Site:
    """A tensor that a module of a block receives or gives.

    Attributes:
        block: number of the block.
        module: path of the module in the block; empty for the block itself.
        of_input: whether it is the module's input, not its output.
    """

    block: int
    module: str
    of_input: bool


class NativeModel:
    """The modules of a Hugging Face model, as they are before transformer-lens changes them.

    Modules are copied and weights are shared, so it takes no memory of its own.

    Args:
        model: the Hugging Face model, on its device, in evaluation mode.
        tokens: ids to find its blocks with.
        copied: False to use the modules themselves: hooks then act on passes of the model, too.

    Raises:
        NoBlocksError: it has no list of blocks that pass on one residual stream.
        Exception: the modules cannot be copied, or whatever the model's forward pass raises.

    Attributes:
        model: the Hugging Face model, with its head.
        blocks: the blocks, in order.
        width: width of the residual stream.
    """

    def __init__(self, model: nn.Module, tokens: Int[Tensor, "context seq"], *, copied: bool = True) -> None:
        self.model: Any = twin_of(model) if copied else model
        self._base: nn.Module = getattr(self.model, "base_model", self.model)
        self._arguments = _without_cache(self._base)
        self.blocks, self.width = self._find_blocks(tokens)

    @torch.no_grad()
    def read(
        self, tokens: Int[Tensor, "context seq"], sites: Mapping[str, Site], *, stop: bool = True
    ) -> dict[str, Float[Tensor, "context seq d_in"]]:
        """Activations at one or several sites, by name, from one pass; `stop` ends it at the last of them."""
        activations: dict[str, Tensor] = {}

        def keep(names: Sequence[str], x: Tensor) -> None:
            if names[0] in activations:  # the module runs again in another block, such as openai-gpt's nonlinearity
                return
            flat = per_token(x, tokens.shape)
            assert flat is not None
            last = stop and len(activations) + len(names) == len(sites)
            activations.update(dict.fromkeys(names, flat if last else flat.clone()))  # models may write into it
            if last:
                raise _AllReadError

        names: dict[Site, list[str]] = {}
        for name, site in sites.items():
            names.setdefault(site, []).append(name)
        with contextlib.ExitStack() as stack, contextlib.suppress(_AllReadError):
            for site, its_names in names.items():
                module = self.blocks[site.block].get_submodule(site.module)
                stack.enter_context(watching(module, site.of_input, lambda x, its_names=its_names: keep(its_names, x)))
            self.run(tokens)
        return {name: activations[name].to(tokens.device) for name in sites}  # the model may be on several

    def run(self, tokens: Int[Tensor, "context seq"]) -> None:
        """Run all blocks."""
        self._base(tokens, **self._arguments)

    def logits(self, tokens: Int[Tensor, "context seq"]) -> Float[Tensor, "context seq vocab"]:
        """Next-token logits in float32, with gradients unless the caller disabled them."""
        return self.model(tokens, **_without_cache(self.model)).logits.float().to(tokens.device)

    def replacing(self, site: Site, replacement: Callable[[Tensor], Tensor]) -> contextlib.AbstractContextManager[None]:
        """While open, what the module at a site receives or gives is replaced; `replacement` keeps its shape."""
        return replacing_at(self.blocks[site.block].get_submodule(site.module), site.of_input, replacement)

    @torch.no_grad()
    def _find_blocks(self, tokens: Int[Tensor, "context seq"]) -> tuple[nn.ModuleList, int]:
        """The longest list of modules, each of which runs once and receives what the one before it gives."""
        lists = [module for module in self._base.modules() if isinstance(module, nn.ModuleList) and len(module)]
        passed: dict[nn.Module, dict[bool, list[Tensor]]] = {
            module: {True: [], False: []} for modules in lists for module in modules
        }
        with contextlib.ExitStack() as stack:
            for module, tensors in passed.items():
                for of_input, places in tensors.items():
                    stack.enter_context(watching(module, of_input, places.append))
            self.run(tokens)
        chains = [modules for modules in lists if _is_chain([passed[module] for module in modules], tokens.shape)]
        if not chains:
            raise NoBlocksError
        blocks = max(chains, key=len)
        return blocks, passed[blocks[0]][True][0].shape[-1]


def _without_cache(module: nn.Module) -> dict[str, bool]:
    """Arguments with which a model builds no cache."""
    parameters = inspect.signature(module.forward).parameters.values()
    takes_use_cache = any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in parameters)
    return {"use_cache": False} if takes_use_cache else {}


class NoBlocksError(Exception):
    """A model has no list of blocks that pass on one residual stream."""


class _AllReadError(Exception):
    """Ends a forward pass once every site has been read."""


def _is_chain(passed: Sequence[Mapping[bool, Sequence[Tensor]]], shape: torch.Size) -> bool:
    if any(len(tensors) != 1 for block in passed for tensors in block.values()):
        return False
    inputs, outputs = ([block[of_input][0] for block in passed] for of_input in (True, False))
    if any(x.ndim != 3 or x.shape != inputs[0].shape or x.shape[:2] != shape for x in (*inputs, *outputs)):
        return False
    return all(same(given, received) for given, received in zip(outputs, inputs[1:], strict=False))


def same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are equal; NaN equals NaN."""
    if x is y:
        return True
    y = y.to(x.device)
    return bool(((x == y) | (x.isnan() & y.isnan())).all())


@contextlib.contextmanager
def watching(module: nn.Module, of_input: bool, act: Callable[[Tensor], None]) -> Iterator[None]:
    """While open, `act` is called with the tensor that the module receives or gives in each pass."""

    def before(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = input_of(given, named)
        if x is not None:
            act(x)

    def after(_: nn.Module, __: Any, output: Any) -> None:
        x = _first_tensor(output)
        if x is not None:
            act(x)

    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True) if of_input else module.register_forward_hook(after)
    )
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def replacing_at(
    module: nn.Module, of_input: bool, replacement: Callable[[Tensor], Tensor], *, first: bool = False
) -> Iterator[None]:
    """While open, the tensor that a module receives or gives is replaced, in each pass.

    Args:
        module: the module.
        of_input: whether it is the module's input, not its output.
        replacement: maps the tensor to one of the same shape.
        first: before other hooks of the module.
    """

    def before(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        x = input_of(given, named)
        if x is None:
            return None
        if given:
            return (replacement(x), *given[1:]), named
        name = next(name for name, value in named.items() if value is x)
        return given, {**named, name: replacement(x)}

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        x = _first_tensor(output)
        if x is None or x is output:
            return None if x is None else replacement(x)
        return type(output)([replacement(x), *output[1:]])

    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True, prepend=first)
        if of_input
        else module.register_forward_hook(after, prepend=first)
    )
    try:
        yield
    finally:
        handle.remove()


def input_of(given: Sequence[Any], named: Mapping[str, Any]) -> Tensor | None:
    """The tensor that a module transforms: its first argument, or the one of that name."""
    first = given[0] if given else named.get("hidden_states", next(iter(named.values()), None))
    return first if isinstance(first, Tensor) else None


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def per_token(x: Tensor, shape: Sequence[int]) -> Float[Tensor, "context seq d_in"] | None:
    """The tensor as `[context, seq, d_in]`; None if it does not have one vector for each token."""
    contexts, length = shape
    if x.ndim >= 3 and x.shape[:2] == (contexts, length):
        return x.flatten(2)
    if x.ndim == 2 and len(x) == contexts * length:
        return x.view(contexts, length, -1)
    return None
