"""SAELens: a folder with `cfg.json` and `sae_weights.safetensors`, of version 6 and of the versions before."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.architectures import MatchingPursuit
from sae.dictionary.base import Dictionary, dtype_name
from sae.dictionary.frame import InputNorm
from sae.dictionary.hook_points import RESIDUAL, split
from sae.dictionary.published import published_entry
from sae.dictionary.saelens_cfg import NORMALISATION, WEIGHT_PROCESSING
from sae.errors import FormatError
from sae.files.printable import one_line
from sae.formats.foreign import Foreign, check_frame, uncentred_bias
from sae.formats.foreign_files import (
    Tensors,
    folder_with,
    read_safetensors,
    read_settings,
    write_safetensors,
    write_settings,
)

NAME = "saelens"
TITLE = "SAELens"
SETTINGS, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
WRITTEN_AS = "6.54.12"
"""The version of SAELens whose files are written."""
WRITES = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated", "batch_topk": "jumprelu",
          "matryoshka": "jumprelu", "matching_pursuit": "matching_pursuit"}  # fmt: skip
"""SAELens's architecture for each of ours. It uses BatchTopK and Matryoshka as JumpReLU too, after training."""
_NOT_READ = {
    "temporal": "it reads whole sequences with attention of its own",
}
_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index",
            "activation_fn_str": "activation_fn"}  # fmt: skip
_SINCE_6 = re.compile(r"([6-9]|[1-9]\d+)(\.|$)")
_SHARED_KINDS = (
    "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "hook_mlp_in",
    "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "mlp.hook_pre", "mlp.hook_post", "ln1.hook_normalized",
    "ln2.hook_normalized",
)  # fmt: skip
"""Hook points that transformer-lens's HookedTransformer has too."""
_NORMS: dict[str, InputNorm] = {theirs: ours for ours, theirs in NORMALISATION.items()}
_TRAINING_ONLY = ("batchtopk", "matryoshka_batchtopk")
_CENTRED = {"center_writing_weights": True}
_PROCESSED = {
    (False, False): "none", (True, False): "fold_ln", (True, True): "center_and_fold", (False, True): "center_and_fold",
}  # fmt: skip


def find(path: Path) -> Path | None:
    """The folder of a dictionary in this format, which is the path or that of the file; None if it is not one."""
    return folder_with(path, SETTINGS, WEIGHTS)


def read(folder: Path) -> Foreign:
    """Read a dictionary.

    Raises:
        FormatError: its architecture or normalisation cannot be used here.
        DamagedError: a file is damaged, or the two do not fit each other.
    """
    settings = read_settings(folder / SETTINGS)
    tensors = Tensors(folder / WEIGHTS, read_safetensors(folder / WEIGHTS))
    metadata = settings.get("metadata")
    facts = {**settings, **(metadata if isinstance(metadata, Mapping) else {})}
    version = str(facts.get("sae_lens_version"))
    if not _SINCE_6.match(version):
        version, settings = "before 6", _renamed(settings)
        facts = {**settings, **facts}
    architecture = one_line(str(settings.get("architecture", "standard")), 40)
    _check_usable(folder, architecture, settings, facts)
    is_tied = architecture == "matching_pursuit"
    W_enc = tensors.take("W_dec", None, None).T if is_tied else tensors.take("W_enc", None, None)
    d_in, d_sae = W_enc.shape
    is_transcoder = "transcoder" in architecture
    W_dec = W_enc.T if is_tied else tensors.take("W_dec", d_sae, None if is_transcoder else d_in)
    d_out = W_dec.shape[1]
    b_dec = tensors.take("b_dec", d_out)
    folded: list[str] = []
    if is_tied and not settings.get("apply_b_dec_to_input", True):
        b_dec = torch.zeros_like(b_dec)
        folded.append("b_dec, which has no part in the reconstruction either")
    W_skip = tensors.take("W_skip", d_out, d_in).T if "skip" in architecture else None
    read_rest = _ACTIVATIONS[architecture]
    rest = read_rest(tensors, settings, d_sae)
    if "scaling_factor" in tensors:
        W_dec = W_dec * tensors.take("scaling_factor", d_sae)[:, None]
    tensors.end()
    norm = _NORMS.get(str(settings.get("normalize_activations")), "none")
    if norm == "none" and _is_centred(facts) and not is_transcoder:
        norm = "centre"
    return Foreign(
        f"SAELens {version}",
        W_enc=W_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        centred=bool(settings.get("apply_b_dec_to_input", not is_transcoder)) and not is_transcoder,
        W_skip=W_skip,
        input_norm=norm,
        folded=folded,
        metadata={**_metadata(facts, processed=norm != "centre"), **_published(folder, facts, d_sae)},
        settings=settings,
        **rest,
    )


def write(dictionary: Dictionary, folder: Path) -> list[str]:
    """Write a dictionary in this format.

    Returns:
        What the format cannot hold.

    Raises:
        FormatError: SAELens has no such architecture, or no such transcoder.
        CacheError: the folder cannot be written.
    """
    origin, architecture = dictionary.origin, _architecture_of(dictionary)
    is_transcoder, norm = dictionary.is_transcoder, dictionary.frame.input_norm
    tensors: dict[str, Tensor] = {name: dictionary.get_parameter(name) for name in ("W_enc", "W_dec", "b_dec")}
    if dictionary.architecture == "gated":
        tensors |= {name: dictionary.get_parameter(name) for name in ("b_gate", "b_mag", "r_mag")}
    elif dictionary.architecture == "matching_pursuit":
        del tensors["W_enc"]
    else:
        tensors["b_enc"] = dictionary.b_enc
        if is_transcoder:
            tensors["b_enc"] = uncentred_bias(dictionary)
    if "jumprelu" in architecture:
        tensors["threshold"] = dictionary.get_parameter("threshold").expand(dictionary.d_sae)
    if dictionary.W_skip is not None:
        tensors["W_skip"] = dictionary.W_skip.T
    model, tokens = origin.models.get("", {}), origin.tokens if isinstance(origin.tokens, Mapping) else {}
    data = origin.data or {}
    source = data.get("source")
    hooks = {"hook_name": origin.reads.hook} | ({"hook_name_out": origin.gives.hook} if is_transcoder else {})
    metadata = {
        "sae_lens_version": WRITTEN_AS,
        "model_name": model.get("name"),
        **hooks,
        "context_size": origin.context_length,
        "prepend_bos": tokens.get("prepend_bos"),
        "exclude_special_tokens": list(tokens.get("masked_ids") or ()) or None,
        "seqpos_slice": [tokens["masked_positions"], None] if tokens.get("masked_positions") else None,
        "dataset_path": source if source is None or isinstance(source, str) else ", ".join(source),
        "model_from_pretrained_kwargs": _CENTRED
        if norm == "centre"
        else WEIGHT_PROCESSING.get(str(model.get("weight_processing"))),
        "training_architecture": dictionary.architecture,
    }
    settings = {
        "architecture": architecture,
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_sae,
        **({"d_out": dictionary.d_out} if is_transcoder else {}),
        "dtype": dtype_name(dictionary.dtype),
        "device": "cpu",
        "apply_b_dec_to_input": not is_transcoder,
        "normalize_activations": NORMALISATION.get(norm, "none"),
        "reshape_activations": "hook_z" if str(origin.reads.hook).endswith("attn.hook_z") else "none",
        **({"k": dictionary.settings()["k"], "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}),
        **(dictionary.settings() if architecture == "matching_pursuit" else {}),
        "metadata": {key: value for key, value in metadata.items() if value is not None},
    }
    write_safetensors(folder / WEIGHTS, tensors)
    write_settings(folder / SETTINGS, settings)
    return _lost(dictionary, [hook for hook in hooks.values() if hook is not None], tokens, model)


def _architecture_of(dictionary: Dictionary) -> str:
    """SAELens's architecture for one of ours.

    Raises:
        FormatError: it has none.
    """
    if dictionary.architecture not in WRITES:
        raise FormatError(f"{TITLE} has only {', '.join(WRITES)}; this is a {type(dictionary).__name__}")
    architecture, is_transcoder = WRITES[dictionary.architecture], dictionary.is_transcoder
    norms = () if is_transcoder else (*NORMALISATION, "centre")
    check_frame(
        dictionary, f"{TITLE}'s {'transcoder' if is_transcoder else architecture}", norms=norms, skip=is_transcoder
    )
    if not is_transcoder:
        return architecture
    if architecture not in ("standard", "jumprelu"):
        raise FormatError(f"{TITLE} has no {dictionary.architecture} transcoder: only ReLU and JumpReLU")
    return (
        ("jumprelu_" if architecture == "jumprelu" else "") + ("skip_" if dictionary.frame.skip else "") + "transcoder"
    )


def _lost(
    dictionary: Dictionary, hooks: Sequence[str], tokens: Mapping[str, Any], model: Mapping[str, Any]
) -> list[str]:  # fmt: skip
    """What SAELens's files cannot hold."""
    lost: list[str] = []
    if dictionary.architecture in ("batch_topk", "matryoshka"):
        kind = type(dictionary).__name__
        lost.append(f"that it is a {kind} of k {dictionary.settings()['k']}: it is a JumpReLU there")
    if dictionary.architecture == "matryoshka":
        lost.append("the sizes of its nested dictionaries")
    if tokens.get("chat_roles"):
        lost.append("which roles of chats counted in training")
    others = [hook for hook in hooks if (split(hook) or (0, ""))[1] not in _SHARED_KINDS]
    lost += [f"{hook}, by a name that SAELens's models know" for hook in others]
    if model.get("weights_sha256"):
        lost.append("the hash of the language model's weights")
    return lost


def _renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a version before 6, under the names of 6."""
    renamed = {_RENAMED.get(key, key): value for key, value in settings.items()}
    arguments = renamed.get("activation_fn_kwargs")
    if renamed.get("activation_fn") == "topk":
        renamed["architecture"] = "topk"
    if renamed.get("architecture") == "topk":
        renamed["k"] = arguments.get("k") if isinstance(arguments, Mapping) else None
    normalisation = renamed.get("normalize_activations")
    if normalisation is None or isinstance(normalisation, bool):
        renamed["normalize_activations"] = "expected_average_only_in" if normalisation else "none"
    renamed.setdefault("prepend_bos", True)
    return renamed


def _check_usable(folder: Path, architecture: str, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Refuse what would be another dictionary here.

    Raises:
        FormatError: the message names it.
    """
    place = f"{str(folder)!r}"
    if architecture in _NOT_READ:
        raise FormatError(f"{place}: SAELens's {architecture} cannot be used here: {_NOT_READ[architecture]}")
    if architecture in _TRAINING_ONLY:
        raise FormatError(
            f"{place}: a {architecture} in training; only what SAELens saves at the end of a training can be used, as "
            "jumprelu"
        )
    if architecture not in _ACTIVATIONS:
        raise FormatError(f"{place}: SAELens's architecture {architecture!r} is not one of {', '.join(_ACTIVATIONS)}")
    normalisation = settings.get("normalize_activations", "none")
    if normalisation not in ("none", "expected_average_only_in", *_NORMS):
        raise FormatError(f"{place}: normalize_activations={one_line(repr(normalisation), 40)} cannot be used here")
    if normalisation in _NORMS and "transcoder" in architecture:
        raise FormatError(
            f"{place}: normalize_activations={normalisation!r} of a transcoder, whose output SAELens does not scale "
            "back, cannot be used here"
        )
    if settings.get("activation_fn", "relu") not in ("relu", "topk", None):
        kind = one_line(str(settings["activation_fn"]), 40)
        raise FormatError(f"{place}: the activation function {kind} cannot be used here, only relu and topk")
    if facts.get("hook_head_index") is not None:
        raise FormatError(
            f"{place}: of a single head ({facts['hook_head_index']}); only all heads together can be read"
        )


def _elementwise(name: str) -> Callable[[Tensors, Mapping[str, Any], int], dict[str, Any]]:
    def read(tensors: Tensors, settings: Mapping[str, Any], d_sae: int) -> dict[str, Any]:
        threshold = {"threshold": tensors.take("threshold", d_sae)} if name == "jumprelu" else {}
        return {"activation": name, "b_enc": tensors.take("b_enc", d_sae), **threshold}

    return read


def _largest(name: str) -> Callable[[Tensors, Mapping[str, Any], int], dict[str, Any]]:
    def read(tensors: Tensors, settings: Mapping[str, Any], d_sae: int) -> dict[str, Any]:
        return {
            "activation": name,
            "b_enc": tensors.take("b_enc", d_sae),
            "k": settings.get("k", 100),  # SAELens's default
            "ranked_by_norm": bool(settings.get("rescale_acts_by_decoder_norm", False)),
        }

    return read


def _pursuit(tensors: Tensors, settings: Mapping[str, Any], d_sae: int) -> dict[str, Any]:
    pursuit = {name: settings[name] for name in MatchingPursuit.setting_names if name in settings}
    return {"activation": "matching_pursuit", "b_enc": None, "pursuit": pursuit}


def _gated(tensors: Tensors, settings: Mapping[str, Any], d_sae: int) -> dict[str, Any]:
    b_gate, b_mag, r_mag = (tensors.take(name, d_sae) for name in ("b_gate", "b_mag", "r_mag"))
    return {"activation": "gated", "b_enc": b_gate, "b_mag": b_mag, "r_mag": r_mag}


_ACTIVATIONS = {
    "standard": _elementwise("relu"),
    "topk": _largest("topk"),
    "abstopk": _largest("abs_topk"),
    "jumprelu": _elementwise("jumprelu"),
    "gated": _gated,
    "matching_pursuit": _pursuit,
    "transcoder": _elementwise("relu"),
    "jumprelu_transcoder": _elementwise("jumprelu"),
    "skip_transcoder": _elementwise("relu"),
    "jumprelu_skip_transcoder": _elementwise("jumprelu"),
}


def _is_centred(facts: Mapping[str, Any]) -> bool:
    """Whether it reads a residual stream, or a part of it, with its mean taken off: all that processing does there."""
    kwargs, hook = facts.get("model_from_pretrained_kwargs"), facts.get("hook_name")
    place = split(hook) if isinstance(hook, str) else None
    is_stream = place is not None and place[1] in RESIDUAL
    return is_stream and isinstance(kwargs, Mapping) and bool(kwargs.get("center_writing_weights"))


def _metadata(facts: Mapping[str, Any], *, processed: bool) -> dict[str, Any]:
    """Facts about the training, in our words.

    Args:
        facts: SAELens's words.
        processed: whether the processing of the model's weights matters; it does not if the dictionary takes off the
            mean itself, since folded norms do not change the stream.
    """
    kwargs, name, length = (facts.get(key) for key in ("model_from_pretrained_kwargs", "model_name", "context_size"))
    model = {"name": name} if isinstance(name, str) else None
    if (
        model and processed and isinstance(kwargs, Mapping)
    ):  # what is not said is unknown: SAELens's registry adds to some files
        centred = bool(kwargs.get("center_writing_weights"))
        model["weight_processing"] = _PROCESSED[bool(kwargs.get("fold_ln")), centred]
    source = facts.get("dataset_path")
    known = {
        "hook": facts.get("hook_name"),
        "target_hook": facts.get("hook_name_out"),
        "model": model,
        "context_length": length if isinstance(length, int) else None,
        "tokens": _tokens(facts),
        "data": {"source": source} if isinstance(source, str) else None,
    }
    return {key: value for key, value in known.items() if value is not None}


def _published(folder: Path, facts: Mapping[str, Any], d_sae: int) -> dict[str, Any]:
    """The L0 in the settings, or else the sum of the features' frequencies, of which SAELens saves log10."""
    stated = published_entry(facts.get("l0"), f"l0 in {SETTINGS}")
    if stated or not (folder / SPARSITY).is_file():
        return stated
    logarithms = read_safetensors(folder / SPARSITY).get("sparsity")
    if logarithms is None or logarithms.shape != (d_sae,) or not logarithms.is_floating_point():
        return {}
    return published_entry(float((10 ** logarithms.double()).sum()), f"frequencies in {SPARSITY}")


def _tokens(facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Which tokens counted, as JSON of a `TokenPolicy`; None if the files do not say it in numbers."""
    bos, excluded, positions = (facts.get(key) for key in ("prepend_bos", "exclude_special_tokens", "seqpos_slice"))
    if not isinstance(bos, bool) or excluded is True:
        return None
    ids = excluded if isinstance(excluded, list) else []
    first = positions[0] if isinstance(positions, list) and len(positions) > 1 else 0
    if not all(type(number) is int and number >= 0 for number in (*ids, first or 0)):
        return None
    return {"prepend_bos": bos, "masked_positions": first or 0, "masked_ids": ids}
