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
from sae.formats.foreign import Foreign, check_frame, processed_weights
from sae.formats.foreign_files import Tensors, read_pickle, write_pickle

NAME = "openai"
TITLE = "OpenAI"
WRITTEN = "autoencoder.pt"
_PLACES = {
    "mlp_post_act": "mlp.hook_post", "resid_delta_attn": "hook_attn_out", "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out", "resid_post_mlp": "hook_resid_post",
}  # fmt: skip
_PUBLISHED = re.compile(rf"({'|'.join(_PLACES)})[^/]*/autoencoders/(\d+)\.pt$")
_WRITTEN = {("relu", "none"), ("topk", "layer_norm")}
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def find(path: Path) -> Path | None:
    """The file, which is the path or in its folder; None if there is none."""
    if (path / WRITTEN).is_file():
        return path / WRITTEN
    return path if path.suffix == ".pt" and path.is_file() else None


def read(path: Path) -> Foreign:
    """Read a dictionary. Those with TopK normalise each token, those with ReLU do not.

    Raises:
        FormatError: it has another activation function.
        DamagedError: the file is damaged.
    """
    content = read_pickle(path)
    activation, state = content.pop("activation", "ReLU"), content.pop("activation_state_dict", {})
    state = state if isinstance(state, Mapping) else {}
    is_topk = activation == "TopK"
    after = state.get("postact_fn", "ReLU")
    if not (is_topk or activation == "ReLU") or after != "ReLU":
        name = one_line(f"{activation} with {after}" if is_topk else str(activation), 40)
        raise FormatError(f"{str(path)!r}: the activation function {name} cannot be used here, only ReLU and TopK")
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
    rest: dict[str, Any] = {"k": _whole(state.get("k")), "input_norm": "layer_norm"} if is_topk else {}
    rest["activation"] = "topk" if is_topk else "relu"
    return Foreign(
        "OpenAI", W_enc=encoder.T, b_enc=b_enc, W_dec=decoder.T, b_dec=b_dec, metadata=metadata, **rest
    )  # fmt: skip


def write(dictionary: Dictionary, folder: Path) -> list[str]:
    """Write a ReLU, or a TopK that normalises each token, in this format.

    Returns:
        What the format cannot hold.

    Raises:
        FormatError: it is another architecture, or a transcoder.
        CacheError: the folder cannot be written.
    """
    norm = dictionary.frame.input_norm
    if (dictionary.architecture, norm) not in _WRITTEN or dictionary.origin.of_transcoder:
        kind = type(dictionary).__name__ + (f" with input_norm={norm}" if norm != "none" else "")
        raise FormatError(f"OpenAI's format has only ReLU, and TopK with layer norm; this is a {kind}")
    check_frame(dictionary, TITLE, norms=["layer_norm"])
    tensors = {
        "pre_bias": dictionary.b_dec, "encoder.weight": dictionary.W_enc.T, "latent_bias": dictionary.b_enc,
        "decoder.weight": dictionary.W_dec.T, **dict.fromkeys(_STATISTICS, torch.zeros(dictionary.d_sae)),
    }  # fmt: skip
    state = {"k": dictionary.settings()["k"], "postact_fn": "ReLU"} if norm == "layer_norm" else {}
    activation = "TopK" if state else "ReLU"
    write_pickle(folder / WRITTEN, {**tensors, "activation": activation, "activation_state_dict": state})
    return ["language model, hook point, tokens and text of its training", *processed_weights(dictionary)]


def _whole(k: Any) -> Any:
    """k as a whole number, if it is a tensor that holds one."""
    return int(k) if isinstance(k, torch.Tensor) and k.numel() == 1 and not k.is_floating_point() else k
