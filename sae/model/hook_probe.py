"""Finds a model's hook points with one pass over a few tokens, before any text is read."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

from sae.dictionary.hook_points import KINDS, READ_ONLY, name_of

_CONTEXTS, _LENGTH = 3, 7
_SAME_IN_MIXTURES = {"mlp.hook_pre": "mlp.hook_in", "mlp.hook_post": "mlp.hook_out"}


@dataclass(frozen=True)
class Hook:
    """A hook point that a model has.

    Attributes:
        name: `blocks.N.` followed by the kind.
        block: N.
        kind: one of `hook_points.KINDS`.
        width: numbers per token, with heads concatenated.
        refusal: why it cannot be replaced; None if it can be.
        heads_first: whether the model holds it as `[context, head, seq, d_head]`.
    """

    name: str
    block: int
    kind: str
    width: int
    refusal: str | None
    heads_first: bool = False

    @property
    def meaning(self) -> str:
        """A short description of its kind."""
        return KINDS[self.kind]

    @property
    def rank(self) -> int:
        """Position of its kind within a block."""
        return list(KINDS).index(self.kind)

    def flat(self, activation: Tensor) -> Tensor:
        """The activation as `[context, seq, width]`."""
        if self.heads_first:
            return rearrange(activation, "context head seq d -> context seq (head d)")
        return activation.flatten(2)

    def unflat(self, x: Tensor, like: Tensor) -> Tensor:
        """The inverse of `flat`, in the model's number type."""
        x = x.to(like.dtype)
        if self.heads_first:
            return rearrange(x, "context seq (head d) -> context head seq d", head=like.shape[1])
        return x.reshape(like.shape)


def probe_tokens(vocabulary: int, contexts: int, length: int, device: torch.device | str) -> Int[Tensor, "context seq"]:
    """Token ids that look random but are always the same (multiples of the golden ratio)."""
    numbers = torch.arange(1, contexts * length + 1, dtype=torch.float64, device="cpu")
    share = (numbers * 0.6180339887498949) % 1
    return (share * vocabulary).long().clamp(max=vocabulary - 1).view(contexts, length).to(device)


def perturbed(x: Tensor) -> Tensor:
    """Other activations of about the same size."""
    return 2 * x.flip(-1) + x.abs().mean()


def read_hooks(bridge: Any, vocabulary: int, device: torch.device | str) -> dict[str, Hook]:
    """Every hook point that gives one vector per token, by name, in the order of blocks and `KINDS`.

    Args:
        bridge: transformer-lens's `TransformerBridge`.
        vocabulary: number of token ids to choose from.
        device: the bridge's device.
    """
    bridge.set_use_hook_mlp_in(True)
    points: Mapping[str, Any] = bridge.hook_dict
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str, activation: Any, hook: Any) -> None:
        if isinstance(activation, Tensor):
            shapes[name] = tuple(activation.shape)

    names = [
        name_of(block, kind)
        for block in range(bridge.cfg.n_layers)
        for kind in KINDS
        if name_of(block, kind) in points and not _is_alias(points, block, kind)
    ]
    fireable = [name for name in names if bridge._gated_hook_reason(name) is None]
    with torch.no_grad(), bridge.hooks(fwd_hooks=[(name, functools.partial(record, name)) for name in fireable]):
        bridge(probe_tokens(vocabulary, _CONTEXTS, _LENGTH, device))
    hooks = (_hook(name, shapes[name]) for name in names if name in shapes)
    return {hook.name: hook for hook in hooks if hook is not None}


def _is_alias(points: Mapping[str, Any], block: int, kind: str) -> bool:
    """Whether the name is an alias of another hook point: a mixture of experts has no `hook_pre` of its own."""
    other = points.get(name_of(block, _SAME_IN_MIXTURES.get(kind, "")))
    return other is not None and points[name_of(block, kind)] is other


def _hook(name: str, shape: tuple[int, ...]) -> Hook | None:
    _, block, kind = name.split(".", 2)
    refusal = READ_ONLY.get(kind)
    if shape[:2] == (_CONTEXTS, _LENGTH) and len(shape) >= 3:
        return Hook(name, int(block), kind, math.prod(shape[2:]), refusal)
    if len(shape) == 4 and shape[0] == _CONTEXTS and shape[2] == _LENGTH:
        return Hook(name, int(block), kind, shape[1] * shape[3], refusal, heads_first=True)
    return None
