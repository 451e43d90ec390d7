"""circuit-tracer: a folder with `config.yaml` and a transcoder per layer, `layer_N.safetensors`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from sae.dictionary.base import Dictionary
from sae.dictionary.hook_points import KINDS, name_of, split
from sae.errors import FormatError
from sae.files.printable import one_line
from sae.files.writing import write_bytes
from sae.formats.foreign import Foreign, check_frame, processed_weights, uncentred_bias
from sae.formats.foreign_files import Tensors, read_safetensors, read_settings, write_safetensors

NAME = "circuit_tracer"
TITLE = "circuit-tracer"
SETTINGS, THRESHOLD = "config.yaml", "activation_function.threshold"
WRITES = ("relu", "jumprelu", "gated", "topk", "batch_topk", "matryoshka")
_FILE = re.compile(r"layer_(\d+)\.safetensors")
_SAME_POINT = {"mlp.hook_out": "hook_mlp_out"}
_INPUTS = {
    "mlp.hook_in": "mlp.hook_in", "hook_mlp_in": "hook_resid_mid", "hook_resid_mid": "hook_resid_mid",
    "ln2.hook_normalized": "ln2.hook_normalized",
}  # fmt: skip
"""Its names for what a transcoder may read. `mlp.hook_in` is added by circuit-tracer itself to transformer-lens."""
_OUTPUT = "hook_mlp_out"
_RELU_FIRST = "relu_before_topk"
"""Entry of `config.yaml` that only this toolkit writes and reads."""


def find(path: Path) -> Path | None:
    """The file of a layer, which is the path itself; None if it is not one."""
    return path if _FILE.fullmatch(path.name) and path.is_file() else None


def layers_in(folder: Path) -> list[str]:
    """Names of the files of a set; empty if the folder holds none."""
    return sorted(entry.name for entry in folder.iterdir() if find(entry))


def read(path: Path) -> Foreign:
    """Read the transcoder of a layer.

    Raises:
        FormatError: it has another activation function, or it is cross-layer.
        DamagedError: a file is damaged.
    """
    layer = _FILE.fullmatch(path.name)
    settings = read_settings(path.parent / SETTINGS) if (path.parent / SETTINGS).is_file() else {}
    rest = _activation(settings, path)
    tensors = Tensors(path, read_safetensors(path))
    W_enc = tensors.take("W_enc", None, None)
    d_sae, d_in = W_enc.shape
    W_dec, b_enc = tensors.take("W_dec", d_sae, None), tensors.take("b_enc", d_sae)
    d_out = W_dec.shape[1]
    b_dec = tensors.take("b_dec", d_out)
    W_skip = tensors.take("W_skip", d_out, d_in).T if "W_skip" in tensors else None
    if THRESHOLD in tensors and rest["activation"] == "relu":
        rest = {"activation": "jumprelu", "threshold": tensors.take(THRESHOLD, d_sae)}
    tensors.end()
    assert layer is not None
    metadata = _metadata(settings, int(layer[1]))
    return Foreign(
        "circuit-tracer", W_enc=W_enc.T, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, centred=False, W_skip=W_skip,
        metadata=metadata, settings=settings, **rest,
    )  # fmt: skip


def _activation(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The activation function of a set, by its settings.

    circuit-tracer's TopK keeps the k largest pre-activations even if they are negative, and so it is another dictionary
    than ours, unless this toolkit wrote it.

    Raises:
        FormatError: it cannot be used here.
    """
    kind = settings.get("activation", "relu")
    if kind == "topk" and settings.get(_RELU_FIRST) is True:
        return {"activation": "topk", "k": settings.get("k")}
    if kind in ("relu", "jumprelu"):
        return {"activation": "relu"}
    kind = repr(one_line(str(kind), 40)) + (", which keeps negative features," if kind == "topk" else "")
    raise FormatError(f"{str(path)!r}: circuit-tracer's activation {kind} cannot be used here, only relu and jumprelu")


def _metadata(settings: dict[str, Any], layer: int) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for ours, theirs in (("hook", "feature_input_hook"), ("target_hook", "feature_output_hook")):
        kind = _SAME_POINT.get(str(settings.get(theirs)), settings.get(theirs))
        if kind in KINDS:
            known[ours] = name_of(layer, str(kind))
    if isinstance(settings.get("model_name"), str):
        known["model"] = {"name": settings["model_name"], "weight_processing": "none"}
    return known


def write_set(
    outlines: Mapping[str, Dictionary], load: Callable[[str], Dictionary], folder: Path
) -> list[str]:  # fmt: skip
    """Write transcoders, one for each layer, as a set. Only one of them is in memory at a time.

    Args:
        outlines: the transcoders by name; they need not have weights.
        load: gives a transcoder with its weights, by name.
        folder: where to write them.

    Returns:
        What the format cannot hold.

    Raises:
        FormatError: circuit-tracer has no such transcoder, or would not load them together.
        CacheError: the folder cannot be written.
    """
    members = [_member(name, outline) for name, outline in outlines.items()]
    layers = _by_layer(members)
    _check_alike(members)
    _check_complete(members)
    skip = any(member.outline.frame.skip for member in members)
    for layer, name in layers.items():
        with torch.no_grad():
            write_safetensors(folder / f"layer_{layer}.safetensors", _tensors(load(name), skip))
    first = members[0]
    settings = {
        "model_kind": "transcoder_set",
        "model_name": first.model.get("name"),
        "feature_input_hook": _INPUTS[first.kind],
        "feature_output_hook": _OUTPUT,
    }
    if first.outline.architecture == "topk":  # others need no name: a layer with thresholds is a JumpReLU, else a ReLU
        settings |= {"activation": "topk", "k": first.outline.settings()["k"], _RELU_FIRST: True}
    stated = {key: value for key, value in settings.items() if value is not None}
    write_bytes(folder / SETTINGS, yaml.safe_dump(stated, sort_keys=False, allow_unicode=True).encode())
    return _lost(members)


@dataclass(frozen=True)
class _Member:
    """A transcoder of a set.

    Attributes:
        name: its name in messages.
        outline: the transcoder; it need not have weights.
        layer: the block whose MLP it replaces.
        kind: what it reads there.
    """

    name: str
    outline: Dictionary
    layer: int
    kind: str

    @property
    def model(self) -> Mapping[str, Any]:
        return self.outline.origin.models.get("", {})


def _member(name: str, outline: Dictionary) -> _Member:
    """A transcoder with its place in the set.

    Raises:
        FormatError: a set cannot hold it.
    """
    reads, gives = outline.origin.reads.hook, outline.origin.gives.hook
    if not outline.is_transcoder:
        raise FormatError(f"{name}: reads and gives {reads!r}, so it is an autoencoder; {TITLE} takes transcoders only")
    if outline.architecture not in WRITES:
        raise FormatError(f"{name}: {TITLE} has only {', '.join(WRITES)}; this is a {type(outline).__name__}")
    check_frame(outline, f"{name}: {TITLE}", skip=outline.d_in == outline.d_out)
    if reads is None or gives is None:
        raise FormatError(f"{name}: its files do not say which hook points it reads and gives, so its layer is unknown")
    start, end = split(reads) or (-1, reads), split(gives) or (-1, gives)
    if start[1] not in _INPUTS or end[1] != _OUTPUT or start[0] != end[0]:
        raise FormatError(
            f"{name}: reads {reads!r} and gives {gives!r}; a transcoder of {TITLE} reads "
            f"{', '.join(_INPUTS)} and gives {_OUTPUT}, both of one block"
        )
    if len(outline.origin.models) > 1:
        raise FormatError(f"{name}: reads one model and gives another; {TITLE} has a single one")
    return _Member(name, outline, *start)


def _by_layer(members: Sequence[_Member]) -> dict[int, str]:
    """Names by layer, in order.

    Raises:
        FormatError: two are of one layer.
    """
    layers: dict[int, str] = {}
    for member in members:
        if member.layer in layers:
            raise FormatError(
                f"{layers[member.layer]} and {member.name} are both of layer {member.layer}: name one for each layer"
            )
        layers[member.layer] = member.name
    return dict(sorted(layers.items()))


def _check_complete(members: Sequence[_Member]) -> None:
    """Check that there is a transcoder for each layer of the model, or up to the last one if it is unknown how many.

    Raises:
        FormatError: a layer has none.
    """
    layers = {member.layer for member in members}
    n_layers = next((n for member in members if type(n := member.model.get("n_layers")) is int), max(layers) + 1)
    missing = [str(layer) for layer in range(n_layers) if layer not in layers]
    if missing:
        named = ", ".join(missing[:8]) + (", …" if len(missing) > 8 else "")
        raise FormatError(f"no transcoder of layer {named}: {TITLE} needs one for each of layers 0 to {n_layers - 1}")


def _check_alike(members: Sequence[_Member]) -> None:
    """Check what the transcoders of a set share.

    Raises:
        FormatError: two differ in it.
    """
    hashed = all(member.model.get("weights_sha256") for member in members)
    facts: dict[str, Callable[[_Member], Any]] = {
        "model": lambda member: None if hashed else member.model.get("name"),  # names of one model may differ
        "weights_sha256 of the model": lambda member: member.model.get("weights_sha256"),
        "weight_processing of the model": lambda member: member.model.get("weight_processing"),
        "hook point that is read": lambda member: _INPUTS[member.kind],
        "d_in": lambda member: member.outline.d_in,
        "d_sae": lambda member: member.outline.d_sae,
        "architecture": lambda member: "topk" if member.outline.architecture == "topk" else "without topk",
        "k of topk": lambda member: member.outline.settings()["k"] if member.outline.architecture == "topk" else None,
    }
    for fact, of in facts.items():
        known = [(member.name, value) for member in members if (value := of(member)) is not None]
        for name, value in known[1:]:
            first_name, first = known[0]
            if value != first:
                raise FormatError(
                    f"{first_name} and {name}: a set of {TITLE} has one {fact}; theirs are {first!r} and {value!r}"
                )


def _tensors(dictionary: Dictionary, skip: bool) -> dict[str, Tensor]:
    """A layer's tensors, in circuit-tracer's layout."""
    W_enc, b_enc, bounds = dictionary.W_enc.T, uncentred_bias(dictionary), None
    if dictionary.architecture == "gated":
        # ReLU(e^r z + b_mag) where z + b_gate > 0, with z = x W_enc, fires where e^r z + b_mag > b_mag − e^r b_gate
        gain, b_mag = dictionary.get_parameter("r_mag").exp(), dictionary.get_parameter("b_mag")
        bounds = b_mag - gain * dictionary.get_parameter("b_gate")
        W_enc, b_enc = gain[:, None] * W_enc, b_mag + gain * (b_enc - dictionary.get_parameter("b_gate"))
    elif dictionary.architecture not in ("relu", "topk"):
        bounds = dictionary.get_parameter("threshold").expand(dictionary.d_sae)
    tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": dictionary.W_dec, "b_dec": dictionary.b_dec}
    if bounds is not None:
        tensors[THRESHOLD] = bounds.clamp(min=0)
    if dictionary.W_skip is not None:
        tensors["W_skip"] = dictionary.W_skip.T
    elif skip:  # whether a set has skip connections is decided there by layer 0
        tensors["W_skip"] = dictionary.b_dec.new_zeros(dictionary.d_out, dictionary.d_in)
    return tensors


def _lost(members: Sequence[_Member]) -> list[str]:
    """What a set cannot hold."""
    first = members[0]
    lost = ["tokens and text of its training", *processed_weights(first.outline)]
    if first.model.get("weights_sha256"):
        lost.append("the hash of the language model's weights")
    for architecture in ("gated", "batch_topk", "matryoshka"):
        names = [member.name for member in members if member.outline.architecture == architecture]
        if names:
            which = "its transcoders are" if len(names) == len(members) else f"{', '.join(names)} are"
            lost.append(f"that {which} {architecture}: they are jumprelu there")
    if any(member.outline.architecture == "matryoshka" for member in members):
        lost.append("the sizes of nested dictionaries")
    if first.outline.architecture == "topk":
        lost.append("that only positive features fire: its TopK keeps the k largest, even if they are negative")
        lost.append("that it is a TopK, for a folder on your machine, which circuit-tracer loads as ReLU")
    if any(member.kind == "hook_mlp_in" for member in members):
        lost.append("hook_mlp_in by this name: it is hook_resid_mid there")
    if any(member.kind == "ln2.hook_normalized" for member in members):
        lost.append("ln2.hook_normalized of a model with LayerNorm: there it includes the norm's gain and bias")
    return lost
