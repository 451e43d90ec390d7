"""Llamascopium (lm-saes): a folder with `config.json` and `sae_weights.safetensors`, or the .pt file in its place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sae.dictionary.frame import InputNorm
from sae.errors import DamagedError, FormatError, UnreadableError
from sae.files.printable import one_line
from sae.formats.foreign import Foreign, row_norms
from sae.formats.foreign_files import Tensors, read_pickle, read_safetensors, read_settings

NAME = "llamascopium"
TITLE = "Llamascopium"
SETTINGS = "config.json"
WEIGHTS = tuple(
    f"{place}.{suffix}"
    for place in ("sae_weights", "checkpoints/pruned", "checkpoints/final")
    for suffix in ("safetensors", "pt")
)
"""Where the package looks for the weights, in its order."""
_NORMS = "dataset_average_activation_norm."


def find(path: Path) -> Path | None:
    """The folder of a dictionary in this format, which is the path or that of the file; None if it is not one."""
    folder = path.parent if path.name in (SETTINGS, *WEIGHTS) else path
    if not (folder / SETTINGS).is_file() or _weights(folder) is None:
        return None
    try:
        return folder if "sae_type" in read_settings(folder / SETTINGS) else None
    except (DamagedError, UnreadableError):
        return None


def read(folder: Path) -> Foreign:
    """Read a dictionary, by the formula of its training.

    Input and output are scaled to a norm of √d_model on average over the data set (`dataset-wise`), or each token is
    (`token-wise`); or nothing is done, since that is folded into the weights (`inference`). With
    `sparsity_include_decoder_norm`, features are chosen by activation × norm of the decoder row.

    Raises:
        FormatError: it is of a kind that cannot be used here.
        DamagedError: a file is damaged, or the two do not fit each other.
    """
    settings = read_settings(folder / SETTINGS)
    path = _weights(folder)
    assert path is not None
    content = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path).get("sae")
    if not isinstance(content, Mapping):
        raise FormatError(f"{str(path)!r}: holds no weights under 'sae'")
    norms = {name: value for name, value in content.items() if str(name).startswith(_NORMS)}
    tensors = Tensors(path, {name: value for name, value in content.items() if name not in norms})
    _check_usable(folder, settings)
    hook, target = settings.get("hook_point_in"), settings.get("hook_point_out")
    W_enc = tensors.take("W_E", None, None)
    d_in, d_sae = W_enc.shape
    W_dec, b_enc = tensors.take("W_D", d_sae, d_in), tensors.take("b_E", d_sae)
    b_dec = tensors.take("b_D", d_in) if settings.get("use_decoder_bias", True) else W_dec.new_zeros(d_in)
    ranked = bool(settings.get("sparsity_include_decoder_norm", True))
    rest: dict[str, Any] = {"activation": settings.get("act_fn", "relu")}
    if rest["activation"] == "topk":
        rest |= {"k": settings.get("top_k", 50), "ranked_by_norm": ranked}
    elif rest["activation"] == "jumprelu":
        threshold = tensors.take("activation_function.log_jumprelu_threshold", d_sae).exp()
        rest["threshold"] = threshold / row_norms(W_dec).to(threshold.dtype) if ranked else threshold
    tensors.end()
    norm: InputNorm = "none"
    kind = settings.get("norm_activation", "dataset-wise")
    if kind == "token-wise":
        norm = "constant_norm"
    elif kind == "dataset-wise":
        rest["input_scale"], rest["output_scale"] = (
            math.sqrt(d_in) / _average(path, norms, str(point)) for point in (hook, target)
        )
    metadata = {"hook": hook, "target_hook": target if target != hook else None}
    return Foreign(
        TITLE, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, centred=False, input_norm=norm,
        metadata={key: value for key, value in metadata.items() if isinstance(value, str)}, settings=settings, **rest,
    )  # fmt: skip


def _weights(folder: Path) -> Path | None:
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def _check_usable(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse what would be another dictionary here.

    Raises:
        FormatError: the message names it.
    """
    for key, usable in (
        ("sae_type", ("sae",)), ("use_glu_encoder", (False,)), ("act_fn", ("relu", "topk", "jumprelu")),
        ("norm_activation", ("dataset-wise", "token-wise", "inference")),
    ):  # fmt: skip
        value = settings.get(key, usable[0])
        if value not in usable:
            shown, allowed = one_line(repr(value), 40), ", ".join(map(repr, usable))
            hint = "; convert it to jumprelu there first" if value == "batchtopk" else ""
            raise FormatError(f"{str(folder)!r}: {key}={shown} cannot be used here, only {allowed}{hint}")
    differs = settings.get("hook_point_in") != settings.get("hook_point_out")
    if settings.get("norm_activation") == "token-wise" and differs:
        raise FormatError(
            f"{str(folder)!r}: a transcoder with norm_activation='token-wise', whose output is scaled back by the norm "
            "of what it reconstructs, cannot be used here"
        )


def _average(path: Path, norms: Mapping[str, Any], hook: str) -> float:
    """The data set's average norm at a hook point.

    Raises:
        FormatError: the file does not hold it.
    """
    value = norms.get(_NORMS + hook)
    number = float(value) if isinstance(value, Tensor) and value.numel() == 1 else math.nan
    if not (math.isfinite(number) and number > 0):
        raise FormatError(f"{str(path)!r}: has no average norm of {hook}, by which its input is scaled")
    return number
