"""Llama Scope: a folder with `hyperparams.json` and `checkpoints/final.safetensors`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from sae.dictionary.published import published_entry
from sae.errors import FormatError
from sae.files.printable import one_line
from sae.formats.foreign import Foreign
from sae.formats.foreign_files import Tensors, read_safetensors, read_settings

NAME = "llama_scope"
TITLE = "Llama Scope"
SETTINGS, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"

_PUBLISHED = {"act_fn": "jumprelu", "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True}
"""Settings that decide the formula, with the values of the published dictionaries."""
_FOLDER = re.compile(r"Llama3_1-8B-(Base|Instruct)")


def find(path: Path) -> Path | None:
    """The folder of a dictionary in this format, which is the path itself; None if it is not one."""
    return path if (path / SETTINGS).is_file() and (path / WEIGHTS).is_file() else None


def read(folder: Path) -> Foreign:
    """Read a dictionary by its authors' formula.

    The input is scaled by √d_in ÷ the data set's average norm, and so is the output by its own. After the scales and
    the norms of the decoder's rows are folded into the weights, a feature fires above the threshold of the settings.

    Raises:
        FormatError: its settings are of another form.
        DamagedError: a file is damaged, or the two do not fit each other.
    """
    settings = read_settings(folder / SETTINGS)
    tensors = Tensors(folder / WEIGHTS, read_safetensors(folder / WEIGHTS))
    norms = settings.get("dataset_average_activation_norm")
    hook, target = settings.get("hook_point_in"), settings.get("hook_point_out")
    threshold = settings.get("jump_relu_threshold")
    if not isinstance(norms, Mapping) or not all(isinstance(norms.get(key), int | float) for key in ("in", "out")):
        raise FormatError(f"{str(folder / SETTINGS)!r}: has no dataset_average_activation_norm")
    for key, published in _PUBLISHED.items():
        if settings.get(key, published) != published:
            value = one_line(str(settings[key]), 40)
            raise FormatError(f"{str(folder)!r}: {key}={value} instead of {published} makes another dictionary")
    numbers = (norms["in"], norms["out"], threshold)
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers) or min(numbers[:2]) <= 0:
        shown = one_line(repr(threshold), 40)
        raise FormatError(f"{str(folder / SETTINGS)!r}: average norms {numbers[:2]!r} and jump_relu_threshold {shown}")
    if hook == target and norms["in"] != norms["out"]:
        raise FormatError(
            f"{str(folder / SETTINGS)!r}: two average norms, {numbers[:2]!r}, of one hook point, {hook!r}"
        )
    decoder = tensors.take("decoder.weight", None, None).T
    d_sae, d_out = decoder.shape
    encoder, b_enc = tensors.take("encoder.weight", d_sae, None), tensors.take("encoder.bias", d_sae)
    b_dec, d_in = tensors.take("decoder.bias", d_out), encoder.shape[1]
    tensors.end()
    input_scale, output_scale = math.sqrt(d_in) / norms["in"], math.sqrt(d_out) / norms["out"]
    # The threshold applies to activations in raw units of rows of norm 1. In the units of these weights, it is:
    lengths = decoder.float().norm(dim=-1) / output_scale
    thresholds = torch.where(lengths > 0, threshold / lengths.where(lengths > 0, 1.0), 0.0)
    model = _FOLDER.search(folder.absolute().name)
    name = settings.get("model_name") or (model and f"meta-llama/Llama-3.1-8B{'-Instruct' * (model[1] == 'Instruct')}")
    metadata = {
        "hook": hook if isinstance(hook, str) else None,
        "target_hook": target if isinstance(target, str) and target != hook else None,
        "model": {"name": name, "weight_processing": "none"} if isinstance(name, str) else None,
    }
    return Foreign(
        "Llama Scope",
        "jumprelu",
        encoder.T,
        b_enc,
        decoder,
        b_dec,
        centred=False,
        threshold=thresholds,
        input_scale=input_scale,
        output_scale=output_scale,
        metadata={
            **{key: value for key, value in metadata.items() if value is not None},
            **published_entry(settings.get("top_k"), f"top_k of its training, in {SETTINGS}"),
        },
        settings=settings,
    )
