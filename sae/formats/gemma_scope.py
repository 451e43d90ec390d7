"""Gemma Scope: the first edition's `params.npz`, and the second's `params.safetensors` with `config.json`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sae.dictionary.hook_points import name_of
from sae.dictionary.published import published_entry
from sae.errors import FormatError
from sae.formats.foreign import Foreign
from sae.formats.foreign_files import Tensors, read_npz, read_safetensors, read_settings

NAME = "gemma_scope"
TITLE = "Gemma Scope"
FIRST, SECOND, SETTINGS = "params.npz", "params.safetensors", "config.json"
_LAYER = re.compile(r"layer_(\d+)")
_L0 = re.compile(r"average_l0_(\d+)")
_REPOSITORY = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)")
_KINDS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
_KINDS_2 = {
    "resid_post": ("hook_resid_post",), "attn_out": ("attn.hook_z",), "mlp_out": ("hook_mlp_out",),
    "transcoder": ("mlp.hook_in", "hook_mlp_out"),
}  # fmt: skip
"""What a dictionary of the second edition reads, and gives if that is something else, by the folder above it."""


def find(path: Path) -> Path | None:
    """The folder with the parameters, which is the path or that of the file; None if there is none."""
    folder = path.parent if path.name in (FIRST, SECOND) else path
    return folder if any((folder / name).is_file() for name in (FIRST, SECOND)) else None


def read(folder: Path) -> Foreign:
    """Read a dictionary. Model and hook point are taken from the names of the folders, as they are published.

    Raises:
        FormatError: it is of a kind that cannot be used here.
        DamagedError: a file is damaged.
    """
    return _read_first(folder) if (folder / FIRST).is_file() else _read_second(folder)


def _read_first(folder: Path) -> Foreign:
    tensors = Tensors(folder / FIRST, read_npz(folder / FIRST))
    names = folder.absolute().as_posix()
    layers, repository = _LAYER.findall(names), _REPOSITORY.search(names)
    W_enc = tensors.take("W_enc", None, None)
    d_in, d_sae = W_enc.shape
    W_dec, b_enc = tensors.take("W_dec", d_sae, d_in), tensors.take("b_enc", d_sae)
    b_dec, threshold = tensors.take("b_dec", d_in), tensors.take("threshold", d_sae)
    tensors.end()
    metadata: dict[str, Any] = {}
    if repository is not None:
        size, tuned, kind = repository.groups()
        metadata["model"] = {
            "name": f"google/gemma-2-{size}{'-it' if tuned == 'it' else ''}",
            "weight_processing": "none",
        }
        if layers:
            metadata |= _sites(int(layers[-1]), kind)
    if l0 := _L0.fullmatch(folder.absolute().name):
        metadata |= published_entry(int(l0[1]), f"{l0[0]}, the folder's name")
    return Foreign(
        "Gemma Scope", "jumprelu", W_enc, b_enc, W_dec, b_dec, centred=False, threshold=threshold, metadata=metadata
    )  # fmt: skip


def _read_second(folder: Path) -> Foreign:
    settings = read_settings(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    tensors = Tensors(folder / SECOND, read_safetensors(folder / SECOND))
    W_enc = tensors.take("w_enc", None, None)
    d_in, d_sae = W_enc.shape
    W_dec, b_enc = tensors.take("w_dec", d_sae, None), tensors.take("b_enc", d_sae)
    d_out = W_dec.shape[1]
    b_dec, threshold = tensors.take("b_dec", d_out), tensors.take("threshold", d_sae)
    skip = "affine_skip_connection"
    W_skip = tensors.take(skip, d_in, d_out) if skip in tensors else None
    tensors.end()
    metadata: dict[str, Any] = {}
    if isinstance(settings.get("model_name"), str):
        metadata["model"] = {"name": _model_name(settings["model_name"]), "weight_processing": "none"}
    metadata |= published_entry(settings.get("l0"), f"l0 in {SETTINGS}")
    layer = _LAYER.search(folder.absolute().name)
    kinds = next((kinds for name, kinds in _KINDS_2.items() if folder.absolute().parent.name.startswith(name)), None)
    if layer is not None and kinds is not None:
        metadata |= dict(zip(("hook", "target_hook"), (name_of(int(layer[1]), kind) for kind in kinds), strict=False))
    elif "transcoder" in str(settings.get("type")):
        raise FormatError(
            f"{str(folder)!r}: a transcoder, whose layer is only in the published folders' names: keep them"
        )
    return Foreign(
        "Gemma Scope 2", "jumprelu", W_enc, b_enc, W_dec, b_dec, centred=False, W_skip=W_skip, threshold=threshold,
        metadata=metadata, settings=settings,
    )  # fmt: skip


def _model_name(name: str) -> str:
    """The model's name on the hub, from the one in the settings."""
    name = name.replace("-v3", "-3")
    name = name.removesuffix("-pt") if "270m" in name else name
    return name if "/" in name else f"google/{name}"


def _sites(layer: int, kind: str) -> dict[str, str]:
    if kind == "transcoders":
        return {"hook": name_of(layer, "ln2.hook_normalized"), "target_hook": name_of(layer, "hook_mlp_out")}
    return {"hook": name_of(layer, _KINDS[kind])}
