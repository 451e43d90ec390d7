"""circuit-tracer: a folder with `config.yaml` and a transcoder per layer, `layer_N.safetensors`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sae.dictionary.hook_points import KINDS, name_of
from sae.errors import FormatError
from sae.files.printable import one_line
from sae.formats.foreign import Foreign
from sae.formats.foreign_files import Tensors, read_safetensors, read_settings

NAME = "circuit_tracer"
TITLE = "circuit-tracer"
SETTINGS = "config.yaml"
_FILE = re.compile(r"layer_(\d+)\.safetensors")
_SAME_POINT = {"mlp.hook_out": "hook_mlp_out"}


def find(path: Path) -> Path | None:
    """The file of a layer, which is the path itself; None if it is not one."""
    return path if _FILE.fullmatch(path.name) and path.is_file() else None


def read(path: Path) -> Foreign:
    """Read the transcoder of a layer.

    Raises:
        FormatError: it has another activation function, or it is cross-layer.
        DamagedError: a file is damaged.
    """
    layer = _FILE.fullmatch(path.name)
    settings = read_settings(path.parent / SETTINGS) if (path.parent / SETTINGS).is_file() else {}
    if settings.get("activation", "relu") not in ("relu", "jumprelu"):
        kind = one_line(str(settings["activation"]), 40)
        raise FormatError(
            f"{str(path)!r}: circuit-tracer's activation {kind!r} cannot be used here, only relu and jumprelu"
        )
    tensors = Tensors(path, read_safetensors(path))
    W_enc = tensors.take("W_enc", None, None)
    d_sae, d_in = W_enc.shape
    W_dec, b_enc = tensors.take("W_dec", d_sae, None), tensors.take("b_enc", d_sae)
    d_out = W_dec.shape[1]
    b_dec = tensors.take("b_dec", d_out)
    W_skip = tensors.take("W_skip", d_out, d_in).T if "W_skip" in tensors else None
    rest: dict[str, Any] = {"activation": "relu"}
    if "activation_function.threshold" in tensors:
        rest = {"activation": "jumprelu", "threshold": tensors.take("activation_function.threshold", d_sae)}
    tensors.end()
    assert layer is not None
    metadata = _metadata(settings, int(layer[1]))
    return Foreign(
        "circuit-tracer", W_enc=W_enc.T, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, centred=False, W_skip=W_skip,
        metadata=metadata, settings=settings, **rest,
    )  # fmt: skip


def _metadata(settings: dict[str, Any], layer: int) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for ours, theirs in (("hook", "feature_input_hook"), ("target_hook", "feature_output_hook")):
        kind = _SAME_POINT.get(str(settings.get(theirs)), settings.get(theirs))
        if kind in KINDS:
            known[ours] = name_of(layer, str(kind))
    if isinstance(settings.get("model_name"), str):
        known["model"] = {"name": settings["model_name"], "weight_processing": "none"}
    return known
