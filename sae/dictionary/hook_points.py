"""Hook points: the grammar of their names, their order in a block, and their meaning."""

from __future__ import annotations

import difflib
import re

KINDS: dict[str, str] = {
    "hook_resid_pre": "residual stream that enters the block",
    "ln1.hook_in": "input of the norm before attention",
    "ln1.hook_normalized": "input of the norm before attention, normalised, before the norm's gain and bias",
    "mamba.hook_in": "input of the Mamba layer, after the norm",
    "mamba.hook_out": "output of the Mamba layer",
    "mixer.hook_in": "input of the block's mixer, after the norm",
    "mixer.hook_out": "output of the mixer",
    "linear_attn.hook_in": "input of linear attention, after the norm",
    "linear_attn.hook_out": "output of linear attention",
    "conv.hook_in": "input of the convolution, after the norm",
    "conv.hook_out": "output of the convolution",
    "attn.hook_in": "input of attention, after the norm",
    "attn.hook_q": "queries, heads concatenated, before rotary positions",
    "attn.hook_k": "keys, key-value heads concatenated",
    "attn.hook_v": "values, key-value heads concatenated",
    "attn.hook_z": "heads' outputs before the output projection",
    "hook_attn_out": "what attention adds to the residual stream",
    "hook_mlp_in": "input of the MLP's branch, before the norm",
    "hook_resid_mid": "residual stream between attention and MLP",
    "ln2.hook_normalized": "input of the norm before the MLP, normalised, before the norm's gain and bias",
    "mlp.hook_in": "input of the MLP, after the norm",
    "mlp.hook_pre": "MLP before its nonlinearity",
    "mlp.hook_pre_linear": "the factor that a gated MLP multiplies with",
    "mlp.hook_post": "MLP after its nonlinearity, before the output projection",
    "hook_mlp_out": "what the MLP adds to the residual stream",
    "hook_resid_post": "residual stream that leaves the block",
}
"""Descriptions by kind (the part of the name after `blocks.N.`), in the order in which a block computes them."""

RESIDUAL = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
"""Kinds whose activations are added to, or are, the residual stream, which the unembedding reads."""

READ_ONLY: dict[str, str] = {
    "hook_resid_mid": "transformer-lens can read hook_resid_mid but not replace it (the skip connection would keep the "
    "original); use hook_resid_pre, hook_resid_post, hook_attn_out or hook_mlp_out",
    "ln1.hook_normalized": "a norm can be read in its middle but is not computed from there; use ln1.hook_in or "
    "attn.hook_in",
    "ln2.hook_normalized": "a norm can be read in its middle but is not computed from there; use hook_mlp_in or "
    "mlp.hook_in",
}
"""Kinds that cannot be replaced, and why."""

_NAME = re.compile(r"blocks\.(0|[1-9]\d*)\.(.+)")
_BLOCK = re.compile(r"blocks\.(\d+)\.")


def split(hook: str) -> tuple[int, str] | None:
    """Block number and kind; None if it is not a hook point."""
    match = _NAME.fullmatch(hook)
    return (int(match[1]), match[2]) if match and match[2] in KINDS else None


def name_of(block: int, kind: str) -> str:
    """The inverse of `split`."""
    return f"blocks.{block}.{kind}"


def block_of(hook: str) -> int | None:
    """The block in any name that begins like a hook point, even one that only other tools know."""
    match = _BLOCK.match(hook)
    return int(match[1]) if match else None


def no_hook_point(hook: str) -> str:
    """The error message for a name that is not a hook point, with the nearest one that is."""
    match = _NAME.fullmatch(hook)
    return f"hook {hook!r}: expected blocks.N. and one of {', '.join(KINDS)}" + nearest(
        match[2] if match else hook, KINDS, int(match[1]) if match else 0
    )


def nearest(kind: str, kinds: dict[str, str] | list[str], block: int) -> str:
    """`; did you mean …?`, if one of the kinds is similar."""
    matches = difflib.get_close_matches(kind, list(kinds), 1, 0.5)
    return f"; did you mean {name_of(block, matches[0])}?" if matches else ""


def place_in_model(hook: str) -> tuple[int, int] | None:
    """Block and position in it; they order hook points as the model computes them. None if not a hook point."""
    parts = split(hook)
    return None if parts is None else (parts[0], list(KINDS).index(parts[1]))
