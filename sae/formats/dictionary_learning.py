"""dictionary_learning: a folder with `ae.pt`, plain tensors by name, and `config.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sae.architectures import Matryoshka
from sae.dictionary.base import Dictionary
from sae.dictionary.hook_points import block_of, name_of
from sae.errors import FormatError
from sae.formats.foreign import Foreign, check_frame, processed_weights, uncentred_bias
from sae.formats.foreign_files import Tensors, folder_with, read_pickle, read_settings, write_pickle, write_settings

NAME = "dictionary_learning"
TITLE = "dictionary_learning"
SETTINGS, WEIGHTS = "config.json", "ae.pt"
_CLASSES = {
    "relu": "AutoEncoder", "topk": "AutoEncoderTopK", "batch_topk": "BatchTopKSAE", "gated": "GatedAutoEncoder",
    "jumprelu": "JumpReluAutoEncoder", "matryoshka": "MatryoshkaBatchTopKSAE",
}  # fmt: skip


def find(path: Path) -> Path | None:
    """The folder of a dictionary in this format, which is the path or that of the file; None if it is not one."""
    return folder_with(path, SETTINGS, WEIGHTS)


def read(folder: Path) -> Foreign:
    """Read a dictionary.

    Raises:
        FormatError: its class is unknown, or its training was interrupted.
        DamagedError: a file is damaged, or the two do not fit each other.
    """
    settings = read_settings(folder / SETTINGS)
    trainer = settings.get("trainer")
    if not isinstance(trainer, Mapping):
        raise FormatError(f"{str(folder / SETTINGS)!r}: has no settings of a trainer, such as dict_class")
    content = read_pickle(folder / WEIGHTS)
    if "ae" in content and "optimizer" in content:
        raise FormatError(
            f"{str(folder / WEIGHTS)!r}: the state of an interrupted training, whose weights take normalised "
            "activations; finish the training first"
        )
    kind = str(trainer.get("dict_class"))
    if kind not in _READERS:
        raise FormatError(f"{str(folder)!r}: the class {kind!r} is not one of {', '.join(_READERS)}")
    tensors = Tensors(folder / WEIGHTS, content)
    parts = _READERS[kind](tensors)
    tensors.end()
    metadata = _metadata(settings, trainer)
    return Foreign(f"dictionary_learning, {kind}", **parts, metadata=metadata, settings=settings)


def _standard(tensors: Tensors) -> dict[str, Any]:
    return {"activation": "relu", **_linear(tensors, "bias"), "b_enc": tensors.take("encoder.bias", None)}


def _uncentred(tensors: Tensors) -> dict[str, Any]:
    parts = {"activation": "relu", **_linear(tensors, "decoder.bias"), "b_enc": tensors.take("encoder.bias", None)}
    return {**parts, "centred": False}


def _gated(tensors: Tensors) -> dict[str, Any]:
    parts = _linear(tensors, "decoder_bias")
    b_gate, b_mag, r_mag = (tensors.take(name, None) for name in ("gate_bias", "mag_bias", "r_mag"))
    return {"activation": "gated", **parts, "b_enc": b_gate, "b_mag": b_mag, "r_mag": r_mag}


def _topk(tensors: Tensors) -> dict[str, Any]:
    tensors.drop("threshold")  # used only on request
    parts = {**_linear(tensors, "b_dec"), "b_enc": tensors.take("encoder.bias", None)}
    return {"activation": "topk", **parts, "k": tensors.number("k")}


def _batch_topk(tensors: Tensors) -> dict[str, Any]:
    parts = {**_linear(tensors, "b_dec"), "b_enc": tensors.take("encoder.bias", None)}
    return {"activation": "batch_topk", **parts, "k": tensors.number("k"), "threshold": tensors.take("threshold")}


def _matryoshka(tensors: Tensors) -> dict[str, Any]:
    tensors.drop("group_sizes")
    parts = {name: tensors.take(name, *[None] * (2 if name.startswith("W") else 1)) for name in _PLAIN}
    return {"activation": "batch_topk", **parts, "k": tensors.number("k"), "threshold": tensors.take("threshold")}


def _jumprelu(tensors: Tensors) -> dict[str, Any]:
    parts = {name: tensors.take(name, *[None] * (2 if name.startswith("W") else 1)) for name in _PLAIN}
    return {"activation": "jumprelu", **parts, "threshold": tensors.take("threshold", None), "centred": False}


_PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
_READERS: dict[str, Callable[[Tensors], dict[str, Any]]] = {
    "AutoEncoder": _standard,
    "AutoEncoderNew": _uncentred,
    "GatedAutoEncoder": _gated,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batch_topk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "JumpReluAutoEncoder": _jumprelu,
}


def _linear(tensors: Tensors, bias: str) -> dict[str, Any]:
    """Encoder and decoder of torch's linear layers, whose weights are transposed."""
    W_enc, W_dec = tensors.take("encoder.weight", None, None).T, tensors.take("decoder.weight", None, None).T
    return {"W_enc": W_enc, "W_dec": W_dec, "b_dec": tensors.take(bias, None)}


def write(dictionary: Dictionary, folder: Path) -> list[str]:
    """Write a dictionary in this format.

    Returns:
        What the format cannot hold.

    Raises:
        FormatError: it is a transcoder, or of an architecture that the toolkit lacks.
        CacheError: the folder cannot be written.
    """
    if dictionary.origin.of_transcoder:
        raise FormatError(f"{TITLE} has no transcoders")
    architecture, settings = dictionary.architecture, dictionary.settings()
    if architecture not in _CLASSES:
        raise FormatError(f"{TITLE} has only {', '.join(_CLASSES)}; this is a {type(dictionary).__name__}")
    check_frame(dictionary, TITLE)
    linear = {"encoder.weight": dictionary.W_enc.T, "decoder.weight": dictionary.W_dec.T}
    plain = {"W_enc": dictionary.W_enc, "W_dec": dictionary.W_dec, "b_dec": dictionary.b_dec}
    lost: list[str] = []
    if architecture == "gated":
        gate, magnitude, gain = (dictionary.get_parameter(name) for name in ("b_gate", "b_mag", "r_mag"))
        tensors = {**linear, "decoder_bias": dictionary.b_dec, "gate_bias": gate, "mag_bias": magnitude, "r_mag": gain}
    elif architecture == "jumprelu":
        b_enc = uncentred_bias(dictionary)  # its JumpReLU does not centre its input
        tensors = {**plain, "b_enc": b_enc, "threshold": dictionary.get_parameter("threshold")}
    elif isinstance(dictionary, Matryoshka):
        ends = dictionary.prefix_sizes
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        tensors = {**plain, "b_enc": dictionary.b_enc, "group_sizes": torch.tensor(sizes)}
    elif architecture == "relu":
        tensors = {**linear, "encoder.bias": dictionary.b_enc, "bias": dictionary.b_dec}
    else:
        tensors = {**linear, "encoder.bias": dictionary.b_enc, "b_dec": dictionary.b_dec}
    if architecture in ("topk", "batch_topk", "matryoshka"):
        never = torch.tensor(-1.0)
        threshold = never if architecture == "topk" else dictionary.get_parameter("threshold").float()
        tensors |= {"k": torch.tensor(settings["k"], dtype=torch.int32), "threshold": threshold}
    origin = dictionary.origin
    block = block_of(origin.gives.hook or "")
    trainer = {
        "dict_class": _CLASSES[architecture],
        "activation_dim": dictionary.d_in,
        "dict_size": dictionary.d_sae,
        "layer": block,
        "lm_name": origin.models.get("", {}).get("name"),
        "submodule_name": None if block is None else f"resid_post_layer_{block}",
        **({"k": settings["k"]} if "k" in settings else {}),
    }
    if origin.gives.hook is not None and not origin.gives.hook.endswith("hook_resid_post"):
        lost.append(f"the hook point {origin.gives.hook}: its files know the residual stream after a block")
        trainer["submodule_name"] = origin.gives.hook
    write_pickle(folder / WEIGHTS, tensors)
    write_settings(folder / SETTINGS, {"trainer": trainer, "buffer": {"ctx_len": origin.context_length}})
    lost += ["tokens and text of its training", "the hash of the language model's weights"]
    return [*lost, *processed_weights(dictionary)]


def _metadata(settings: Mapping[str, Any], trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Facts about the training, in our words. It reads the outputs of transformers' modules."""
    known: dict[str, Any] = {}
    layer, name, buffer = trainer.get("layer"), trainer.get("lm_name"), settings.get("buffer")
    module = trainer.get("submodule_name")
    reads_outputs = not isinstance(buffer, Mapping) or buffer.get("io", "out") == "out"
    if isinstance(module, str) and block_of(module) is not None:
        known["hook"] = module
    elif isinstance(layer, int) and (module is None or "resid" in str(module)) and reads_outputs:
        known["hook"] = name_of(layer, "hook_resid_post")
    if isinstance(name, str):
        known["model"] = {"name": name, "weight_processing": "none"}
    if isinstance(buffer, Mapping) and isinstance(buffer.get("ctx_len"), int):
        known["context_length"] = buffer["ctx_len"]
    return known
