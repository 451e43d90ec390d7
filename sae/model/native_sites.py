"""Where transformers' modules have a model's hook points, proved with a few tokens.

With transformer-lens, a site is accepted if it has the bridge's activations. Without it, the residual stream and what
is added to it are found from the blocks alone.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.dictionary.hook_points import KINDS, name_of
from sae.model.hook_probe import Hook, perturbed
from sae.model.native import NativeModel, Site, per_token, replacing_at, same, watching

_FLOAT32_BOUND, _ROUNDING_STEPS = 1e-6, 2
_ALIKE = 1e-4
_NORM = re.compile(r"norm|(^|\.)ln_?\w*$", re.IGNORECASE)
_ATTENTION = re.compile(r"(?<!linear_)attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|feed_?forward|ffn?\b|moe|mixture|experts|fc_?(in|1)$", re.IGNORECASE)


class MatchingSites:
    """The sites of hook points whose activations are those of a bridge.

    A site is found among the inputs and outputs of its block's modules: the one nearest to the bridge's activations if
    the block receives what the bridge's block receives. The activations of the whole model there must then differ from
    the bridge's by at most 1e-6 of a token's norm in float32, times √(1 + blocks); in float16, in bfloat16 and with
    coarse products on a GPU, by two rounding steps instead, at half of the tokens or more.

    Args:
        native: the model as transformers runs it.
        bridge: transformer-lens's bridge of the same model, without changes to its weights.
        hooks: the bridge's hook points, by name.
        tokens: ids to compare them on.
    """

    def __init__(
        self, native: NativeModel, bridge: Any, hooks: Mapping[str, Hook], tokens: Int[Tensor, "context seq"]
    ) -> None:
        self._native, self._bridge, self._hooks, self._tokens = native, bridge, hooks, tokens
        self._sites: dict[str, Site | None] = {}

    def of(self, names: Sequence[str]) -> dict[str, Site] | None:
        """The sites of hook points; None if one of them has none."""
        unknown = [name for name in names if name not in self._sites]
        if unknown:
            self._sites |= dict.fromkeys(unknown)
            self._sites |= self._find(unknown)
        sites = {name: site for name in names if (site := self._sites[name]) is not None}
        return sites if len(sites) == len(set(names)) else None

    @torch.no_grad()
    def _find(self, names: Sequence[str]) -> dict[str, Site]:
        hooks = [self._hooks[name] for name in names]
        blocks = sorted({hook.block for hook in hooks})
        residual = {block: name_of(block, "hook_resid_pre") for block in blocks}
        if max(blocks) >= len(self._native.blocks) or any(name not in self._hooks for name in residual.values()):
            return {}
        truth = self._bridged([*names, *residual.values()])
        nearest = {name: _Nearest(truth[name]) for name in names}
        with contextlib.ExitStack() as stack:
            for block, name in residual.items():
                stack.enter_context(_given(self._native.blocks[block], truth[name]))
                for site, module in _sites_of(self._native, block):
                    of_block = [nearest[hook.name] for hook in hooks if hook.block == block]
                    act = functools.partial(_compare, of_block, site, self._tokens.shape)
                    stack.enter_context(watching(module, site.of_input, act))
            self._native.run(self._tokens)
        bound = _bound(truth[names[0]])
        found = {name: best.site for name, best in nearest.items() if best.site is not None and best.share <= bound}
        own = self._native.read(self._tokens, found, stop=False)
        return {
            name: site
            for name, site in found.items()
            if difference(own[name], truth[name]) <= bound * math.sqrt(1 + site.block)
        }

    def _bridged(self, names: Sequence[str]) -> dict[str, Tensor]:
        activations: dict[str, Tensor] = {}

        def keep(name: str, activation: Tensor, hook: Any) -> None:
            activations[name] = self._hooks[name].flat(activation).clone().to(self._tokens.device)

        with self._bridge.hooks(fwd_hooks=[(name, functools.partial(keep, name)) for name in dict.fromkeys(names)]):
            self._bridge(self._tokens)
        return activations


@dataclass
class _Nearest:
    """The site whose activations are nearest to a hook point's."""

    truth: Tensor
    site: Site | None = None
    share: float = math.inf


def _compare(hooks: Sequence[_Nearest], site: Site, shape: Sequence[int], x: Tensor) -> None:
    activation = per_token(x, shape)
    for hook in hooks:
        if activation is None or activation.shape != hook.truth.shape:
            continue
        share = difference(activation, hook.truth)
        if share < hook.share:
            hook.site, hook.share = site, share


def _sites_of(native: NativeModel, block: int) -> Iterator[tuple[Site, nn.Module]]:
    """Every input and output of the modules of a block, the block's own first."""
    for path, module in native.blocks[block].named_modules():
        for of_input in (True, False):
            yield Site(block, path, of_input), module


def _given(block: nn.Module, residual: Tensor) -> contextlib.AbstractContextManager[None]:
    """While open, a block receives this residual stream."""
    return replacing_at(block, True, lambda own: residual.to(own.dtype), first=True)


def _bound(x: Tensor) -> float:
    eps = torch.finfo(x.dtype).eps
    coarse = x.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    if eps < _FLOAT32_BOUND:
        return _ROUNDING_STEPS * 2**-10 if coarse else _FLOAT32_BOUND
    return _ROUNDING_STEPS * eps


def difference(x: Float[Tensor, "context seq d_in"], truth: Float[Tensor, "context seq d_in"]) -> float:
    """Distance between activations as a share of the truth's norm: root mean square of the tokens' in float32.

    In other types it is the median, since the routers of mixtures of experts may break near ties the other way.
    """
    y = truth.double().to(x.device)
    distance = (x.double() - y).norm(dim=-1)
    shares = distance / y.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    exact = truth.dtype in (torch.float32, torch.float64)
    share = float(shares.square().mean().sqrt() if exact else shares.median())
    return share if math.isfinite(share) else math.inf


@torch.no_grad()
def act_alike(native: NativeModel, site: Site, bridge: Any, hook: Hook, tokens: Int[Tensor, "context seq"]) -> bool:
    """Whether replacing a site changes the logits as replacing the bridge's hook point does.

    They may differ by 1e-4 of the largest in float32, and by twenty rounding steps in other types.
    """

    def in_bridge(activation: Tensor, hook: Any) -> Tensor:
        return point.unflat(perturbed(point.flat(activation)), activation)

    def in_native(x: Tensor) -> Tensor:
        flat = per_token(x, tokens.shape)
        assert flat is not None
        return perturbed(flat).to(x.dtype).reshape(x.shape)

    point, own = hook, native.logits(tokens)
    with bridge.hooks(fwd_hooks=[(hook.name, in_bridge)]):
        expected = bridge(tokens).float().to(tokens.device)
    with native.replacing(site, in_native):
        logits = native.logits(tokens)
    eps = torch.finfo(native.model.dtype).eps
    bound = _ALIKE if eps < _FLOAT32_BOUND else 20 * eps
    scale = expected.abs().max()
    return bool((logits - expected).abs().max() <= bound * scale < (logits - own).abs().max())


@torch.no_grad()
def residual_sites(native: NativeModel, tokens: Int[Tensor, "context seq"]) -> dict[str, Site]:
    """Sites of the residual stream, and of what attention and MLP add to it, from the blocks alone, by hook point.

    Each block receives what the one before it gives; see `NativeModel`. What is added to it is found among the outputs
    of modules: those of attention, and norms behind it, and those of the MLP, and norms behind it, whose sum with the
    block's input is its output to the last bit. Hook points of a block for which there are none are left out.
    """
    sites: dict[str, Site] = {}
    with contextlib.ExitStack() as stack:
        for block in range(len(native.blocks)):
            for act, watched in _Parts(native, block, tokens.shape, sites).watched():
                stack.enter_context(watching(*watched, act))
        native.run(tokens)
    return sites


def residual_hooks(native: NativeModel, sites: Mapping[str, Site]) -> dict[str, Hook]:
    """The hook points at sites of `residual_sites`, by name, in the order of blocks and of kinds in a block."""
    kinds = {name: name.split(".", 2)[2] for name in sites}
    order = sorted(sites, key=lambda name: (sites[name].block, list(KINDS).index(kinds[name])))
    return {name: Hook(name, sites[name].block, kinds[name], native.width, None) for name in order}


class _Parts:
    """The parts of one block, while it runs."""

    def __init__(self, native: NativeModel, block: int, shape: Sequence[int], sites: dict[str, Site]) -> None:
        self._native, self._block, self._shape, self._sites = native, block, shape, sites
        self._paths = [path for path, _ in native.blocks[block].named_modules() if path]
        self._part: str | None = None
        self._received: Tensor | None = None
        self._outputs: dict[str, list[tuple[str, Tensor]]] = {"hook_attn_out": [], "hook_mlp_out": []}

    def watched(self) -> Iterator[tuple[Callable[[Tensor], None], tuple[nn.Module, bool]]]:
        """What to do when the block's modules receive (True) and give (False) their tensors."""
        block = self._native.blocks[self._block]
        yield self._begin, (block, True)
        for path in self._paths:
            part = _part(path)
            if part is not None:
                yield functools.partial(self._enter, part), (block.get_submodule(path), True)
            yield functools.partial(self._keep, path), (block.get_submodule(path), False)
        yield self._end, (block, False)

    def _begin(self, x: Tensor) -> None:
        self._received = x.clone()

    def _enter(self, part: str, x: Tensor) -> None:
        self._part = part

    def _keep(self, path: str, x: Tensor) -> None:
        flat = per_token(x, self._shape)
        if self._part is not None and flat is not None and flat.shape[-1] == self._native.width:
            self._outputs[self._part].append((path, flat.clone()))

    def _end(self, given: Tensor) -> None:
        received, block = self._received, self._block
        assert received is not None
        self._sites[name_of(block, "hook_resid_pre")] = Site(block, "", of_input=True)
        for kind, path in self._added(received.to(given.device), given).items():
            self._sites[name_of(block, kind)] = Site(block, path, of_input=False)
        self._sites[name_of(block, "hook_resid_post")] = Site(block, "", of_input=False)
        self._outputs = {kind: [] for kind in self._outputs}

    def _added(self, received: Tensor, given: Tensor) -> dict[str, str]:
        """The paths of the modules whose outputs are added to the residual stream, by kind of hook point."""
        attention, mlp = ([(path, x.to(given.device)) for path, x in part] for part in self._outputs.values())
        for attention_path, a in attention:
            for mlp_path, m in mlp:
                if any(same(total, given) for total in (received + a + m, received + m + a, received + (a + m))):
                    return {"hook_attn_out": attention_path, "hook_mlp_out": mlp_path}
        for kind, outputs in zip(self._outputs, (attention, mlp), strict=True):
            for path, x in outputs:
                if same(received + x, given):
                    return {kind: path}
        return {}


def _part(path: str) -> str | None:
    """The part of a block that begins when a module begins: attention or MLP; None if neither does."""
    if _NORM.search(path):
        return None
    if _ATTENTION.search(path):
        return "hook_attn_out"
    return "hook_mlp_out" if _MLP.search(path) else None
