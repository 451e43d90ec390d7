"""OpenAI's sparse_autoencoder: one file of tensors, such as `resid_post_mlp_v4/autoencoders/8.pt`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sae.dictionary.base import Dictionary
from sae.dictionary.hook_points import name_of
from sae.errors import FormatError
from sae.files.printable import one_line
from sae.formats.foreign import Foreign, processed_weights
from sae.formats.foreign_files import Tensors, read_pickle, write_pickle

NAME = "openai"
TITLE = "OpenAI"
WRITTEN = "autoencoder.pt"
_PLACES = {
    "mlp_post_act": "mlp.hook_post", "resid_delta_attn": "hook_attn_out", "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out", "resid_post_mlp": "hook_resid_post",
}  # fmt: skip
_PUBLISHED = re.compile(rf"({'|'.join(_PLACES)})[^/]*/autoencoders/(\d+)\.pt$")
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def find(path: Path) -> Path | None:
    """The file, which is the path or in its folder; None if there is none."""
    if (path / WRITTEN).is_file():
        return path / WRITTEN
    return path if path.suffix == ".pt" and path.is_file() else None


def read(path: Path) -> Foreign:
    """Read a dictionary with ReLU. Those with TopK normalise each token, which cannot be folded into weights.

    Raises:
        FormatError: it has TopK.
        DamagedError: the file is damaged.
    """
    content = read_pickle(path)
    activation, state = content.pop("activation", "ReLU"), content.pop("activation_state_dict", {})
    if not isinstance(activation, str) or activation != "ReLU":
        rule = f" (k {state['k']})" if isinstance(state, Mapping) and isinstance(state.get("k"), int) else ""
        activation = one_line(activation, 40) if isinstance(activation, str) else type(activation).__name__
        raise FormatError(
            f"{str(path)!r}: with the activation {activation}{rule}: each token is normalised by itself, which cannot "
            "be folded into the weights"
        )
    tensors = Tensors(path, content)
    tensors.drop(*_STATISTICS)
    encoder = tensors.take("encoder.weight", None, None)
    d_sae, d_in = encoder.shape
    b_dec, b_enc = tensors.take("pre_bias", d_in), tensors.take("latent_bias", d_sae)
    decoder = tensors.take("decoder.weight", d_in, d_sae)
    tensors.end()
    published = _PUBLISHED.search(path.absolute().as_posix())
    metadata: dict[str, Any] = {}
    if published is not None:
        metadata["hook"] = name_of(int(published[2]), _PLACES[published[1]])
        metadata["model"] = {"name": "gpt2", "weight_processing": "none"}
    return Foreign("OpenAI", "relu", encoder.T, b_enc, decoder.T, b_dec, metadata=metadata)


def write(dictionary: Dictionary, folder: Path) -> list[str]:
    """Write a ReLU dictionary in this format.

    Returns:
        What the format cannot hold.

    Raises:
        FormatError: it is another architecture, or a transcoder.
        CacheError: the folder cannot be written.
    """
    if dictionary.architecture != "relu" or dictionary.origin.of_transcoder:
        raise FormatError(
            f"OpenAI's format without its normalisation has only ReLU; this is a {type(dictionary).__name__}"
        )
    tensors = {
        "pre_bias": dictionary.b_dec, "encoder.weight": dictionary.W_enc.T, "latent_bias": dictionary.b_enc,
        "decoder.weight": dictionary.W_dec.T, **dict.fromkeys(_STATISTICS, torch.zeros(dictionary.d_sae)),
    }  # fmt: skip
    write_pickle(folder / WRITTEN, {**tensors, "activation": "ReLU", "activation_state_dict": {}})
    return ["language model, hook point, tokens and text of its training", *processed_weights(dictionary)]
