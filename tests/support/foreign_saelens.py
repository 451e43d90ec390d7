"""Dictionaries in SAELens's files, with its formulas written down plainly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.foreign_weights import (
    D_IN,
    D_SAE,
    Case,
    K,
    largest,
    layer_normed,
    narrow,
    pursuit,
    save_json,
    save_tensors,
    weights,
)

NAMES: dict[str, tuple[str, ...]] = {
    "standard": ("b_enc",), "jumprelu": ("b_enc", "threshold"), "gated": ("b_gate", "b_mag", "r_mag"),
    "topk": ("b_enc",), "abstopk": ("b_enc",), "matching_pursuit": (), "transcoder": ("b_enc",),
    "jumprelu_transcoder": ("b_enc", "threshold"), "skip_transcoder": ("b_enc", "W_skip"),
    "jumprelu_skip_transcoder": ("b_enc", "threshold", "W_skip"),
}  # fmt: skip
"""Tensors of an architecture, in addition to W_enc, W_dec and b_dec."""
PROCESSED = {"center_writing_weights": True}
LEGACY: dict[str, Any] = {
    "d_in": D_IN, "d_sae": D_SAE, "dtype": "float64", "model_name": "gpt2-small", "context_size": 128,
    "hook_point": "blocks.8.hook_resid_pre", "hook_point_head_index": None, "activation_fn_str": "relu",
    "dataset_path": "Skylion007/openwebtext", "normalize_activations": False,
    "model_from_pretrained_kwargs": PROCESSED,
}  # fmt: skip
"""The settings of a version before 6."""


def saelens(architecture: str, unit: bool = True, legacy: bool = False, **extra: Any) -> Case:
    """A dictionary of SAELens; `extra` are settings of its cfg.json."""
    w = weights(unit=unit)
    if "d_out" in extra:
        w = narrow(w)
    is_transcoder = "transcoder" in architecture
    norm = extra.get("normalize_activations", "none")
    tensors = {name: w[name] for name in ("W_enc", "W_dec", "b_dec", *NAMES[architecture])}
    if legacy:
        tensors["scaling_factor"] = torch.full((D_SAE,), 2.0, dtype=torch.float64)
    if architecture == "matching_pursuit":
        del tensors["W_enc"]
    settings = LEGACY if legacy else _settings(architecture, extra)
    is_centred = not is_transcoder and norm == "none"

    def write(folder: Path) -> Path:
        save_json(folder / "cfg.json", settings)
        save_tensors(folder / "sae_weights.safetensors", tensors)
        return folder

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        y, scale, shift = _normalised(x, "centre" if is_centred else norm)
        subtracts = extra.get("apply_b_dec_to_input", True) and not is_transcoder
        f = _features(architecture, y - w["b_dec"] if subtracts else y, w, extra)
        x_hat = ((2 * f if legacy else f) @ w["W_dec"] + w["b_dec"]) * scale + shift
        return f, x_hat + x @ w["W_skip"].T if "skip" in architecture else x_hat

    keeps_rows = architecture == "matching_pursuit" or (
        architecture == "topk" and "rescale_acts_by_decoder_norm" not in extra
    )
    exact = (unit or keeps_rows) and not legacy and architecture != "abstopk"
    return Case(write, forward, exact, _known(is_transcoder, legacy, None if is_centred else "center_and_fold"))


def _settings(architecture: str, extra: dict[str, Any]) -> dict[str, Any]:
    """cfg.json of version 6."""
    is_transcoder = "transcoder" in architecture
    metadata = {
        "sae_lens_version": "6.54.12", "model_name": "gpt2-small", "hook_name": "blocks.8.hook_resid_pre",
        "context_size": 128, "prepend_bos": True, "dataset_path": "Skylion007/openwebtext",
        "exclude_special_tokens": [0, 50256], "seqpos_slice": [2, None], "model_from_pretrained_kwargs": PROCESSED,
    }  # fmt: skip
    if is_transcoder:
        metadata |= {"hook_name": "blocks.8.mlp.hook_in", "hook_name_out": "blocks.8.hook_mlp_out"}
    return {
        "architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "dtype": "float64",
        "apply_b_dec_to_input": not is_transcoder, "normalize_activations": "none", "reshape_activations": "none",
        **({"k": K} if "topk" in architecture else {}), **({"d_out": D_IN} if is_transcoder else {}), **extra,
        "metadata": metadata,
    }  # fmt: skip


def _known(is_transcoder: bool, legacy: bool, processing: str | None) -> dict[str, Any]:
    """What is to be known of it."""
    tokens = {
        "prepend_bos": True, "masked_positions": 0 if legacy else 2, "masked_ids": [] if legacy else [0, 50256],
    }  # fmt: skip
    return {
        "hook": "blocks.8.mlp.hook_in" if is_transcoder else "blocks.8.hook_resid_pre",
        "target": "blocks.8.hook_mlp_out" if is_transcoder else None,
        "context_length": 128, "model": "gpt2-small", "processing": processing, "tokens": tokens,
    }  # fmt: skip


def _normalised(x: Tensor, norm: str) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """The input as it is normalised, and what the reconstruction is multiplied by and added to.

    A model with centred weights takes the mean off the stream.
    """
    if norm == "layer_norm":
        return layer_normed(x)
    if norm == "constant_norm_rescale":
        scale = x.norm(dim=-1, keepdim=True) / D_IN**0.5
        return x / scale, scale, 0.0
    shift = x.mean(-1, keepdim=True)
    return (x - shift, 1.0, shift) if norm == "centre" else (x, 1.0, 0.0)


def _features(architecture: str, y: Tensor, w: dict[str, Tensor], extra: dict[str, Any]) -> Tensor:
    if architecture == "matching_pursuit":
        settings = {
            "threshold": extra.get("residual_threshold", 0.01), "steps": extra.get("max_iterations", D_IN),
            "stops": extra.get("stop_on_duplicate_support", True),
        }  # fmt: skip
        return torch.stack([pursuit(row, w["W_dec"], **settings) for row in y])
    if architecture == "gated":
        gate = y @ w["W_enc"] + w["b_gate"] > 0
        return gate * (y @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
    h, norms = y @ w["W_enc"] + w["b_enc"], w["W_dec"].norm(dim=-1)
    if architecture == "abstopk":
        return largest(h, K, h.abs())
    if architecture == "topk":
        is_ranked = extra.get("rescale_acts_by_decoder_norm")
        return largest(h * norms, K).relu() / norms if is_ranked else largest(h, K).relu()
    return h.relu() * (h > w["threshold"]) if "jumprelu" in architecture else h.relu()
