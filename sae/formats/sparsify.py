"""sparsify (eai-sparsify): a folder per hook point with `cfg.json` and `sae.safetensors`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sae.dictionary.base import Dictionary
from sae.dictionary.hook_points import name_of, split
from sae.errors import FormatError
from sae.formats.foreign import Foreign, check_frame, has_unit_rows, processed_weights, uncentred_bias
from sae.formats.foreign_files import (
    Tensors,
    folder_with,
    read_safetensors,
    read_settings,
    write_safetensors,
    write_settings,
)

NAME = "sparsify"
TITLE = "sparsify"
SETTINGS, WEIGHTS = "cfg.json", "sae.safetensors"
_RUN = "config.json"
_BLOCK = re.compile(r"(?:.*\.)?(?:layers|h|blocks|block)\.(\d+)")
_PARTS = {"mlp": "hook_mlp_out", "attn": "hook_attn_out", "self_attn": "hook_attn_out", "attention": "hook_attn_out"}

_INPUTS = {"hook_resid_post": "hook_resid_pre", "hook_mlp_out": "mlp.hook_in", "hook_attn_out": "attn.hook_in"}
"""What a module receives, by what it gives."""


def find(path: Path) -> Path | None:
    """The folder of a dictionary in this format, which is the path or that of the file; None if it is not one."""
    return folder_with(path, SETTINGS, WEIGHTS)


def read(folder: Path) -> Foreign:
    """Read a dictionary.

    Raises:
        FormatError: it is of a kind that cannot be used here.
        DamagedError: a file is damaged, or the two do not fit each other.
    """
    settings = read_settings(folder / SETTINGS)
    tensors = Tensors(folder / WEIGHTS, read_safetensors(folder / WEIGHTS))
    kind = settings.get("activation", "topk")
    if kind != "topk" or settings.get("signed"):
        what = "signed features" if settings.get("signed") else f"activation={kind!r}"
        raise FormatError(f"{str(folder)!r}: sparsify's {what} cannot be used here, only topk")
    W_dec = tensors.take("W_dec", None, None)
    d_sae, d_in = W_dec.shape
    W_enc = tensors.take("encoder.weight", d_sae, d_in)
    b_enc, b_dec = tensors.take("encoder.bias", d_sae), tensors.take("b_dec", d_in)
    W_skip = tensors.take("W_skip", d_in, d_in).T if settings.get("skip_connection") else None
    tensors.end()
    return Foreign(
        "sparsify",
        "topk",
        W_enc.T,
        b_enc,
        W_dec,
        b_dec,
        centred=not settings.get("transcode", False),
        W_skip=W_skip,
        k=settings.get("k", 32),
        metadata=_metadata(folder, bool(settings.get("transcode", False))),
        settings=settings,
    )


def write(dictionary: Dictionary, folder: Path) -> list[str]:
    """Write a TopK in this format.

    Returns:
        What the format cannot hold.

    Raises:
        FormatError: it is not a TopK.
        CacheError: the folder cannot be written.
    """
    if dictionary.architecture != "topk":
        raise FormatError(f"sparsify has only TopK; this is a {type(dictionary).__name__}")
    check_frame(dictionary, TITLE, skip=dictionary.d_out == dictionary.d_in)
    is_transcoder = dictionary.is_transcoder
    b_enc = uncentred_bias(dictionary) if is_transcoder else dictionary.b_enc
    tensors = {
        "encoder.weight": dictionary.W_enc.T, "encoder.bias": b_enc, "W_dec": dictionary.W_dec,
        "b_dec": dictionary.b_dec,
    }  # fmt: skip
    if dictionary.W_skip is not None:
        tensors["W_skip"] = dictionary.W_skip.T
    write_safetensors(folder / WEIGHTS, tensors)
    settings = {
        "activation": "topk",
        "expansion_factor": max(1, dictionary.d_sae // dictionary.d_in),
        "normalize_decoder": not is_transcoder and has_unit_rows(dictionary.W_dec),
        "num_latents": dictionary.d_sae,
        "k": dictionary.settings()["k"],
        "multi_topk": False,
        "skip_connection": dictionary.W_skip is not None,
        "transcode": is_transcoder,
        "d_in": dictionary.d_in,
    }
    write_settings(folder / SETTINGS, settings)
    training = (
        "language model, hook point, tokens and text of its training (sparsify names the folder after the module)"
    )
    return [training, *processed_weights(dictionary)]


def _metadata(folder: Path, transcodes: bool) -> dict[str, Any]:
    """The hook point from the folder's name, and the model from the run's settings next to it."""
    known: dict[str, Any] = {}
    hook = hook_of(folder.name)
    if hook is not None:
        block, kind = split(hook) or (0, "")
        known |= {"hook": name_of(block, _INPUTS[kind]), "target_hook": hook} if transcodes else {"hook": hook}
    run = folder.parent / _RUN
    if run.is_file():
        settings = read_settings(run)
        if isinstance(settings.get("model"), str):
            known["model"] = {"name": settings["model"], "weight_processing": "none"}
        if isinstance(settings.get("ctx_len"), int):
            known["context_length"] = settings["ctx_len"]
        if isinstance(settings.get("dataset"), str):
            known["data"] = {"source": settings["dataset"]}
    return known


def hook_of(module: str) -> str | None:
    """The hook point at the output of a module of transformers, such as `layers.10` or `h.6.mlp`; None if unknown."""
    match = _BLOCK.match(module)
    if match is None:
        return None
    rest = module[match.end() :].lstrip(".")
    kind = "hook_resid_post" if not rest else _PARTS.get(rest)
    return None if kind is None else name_of(int(match[1]), kind)
