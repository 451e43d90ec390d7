"""SAEBench on dictionaries whose files are of other toolkits, beside the trained ones that they equal.

The files are made from the weights of trained dictionaries by hand, with no code of the other toolkits: decoder rows
get random norms, and encoders, biases and thresholds their inverse, which is the same function. `sae.load` reads them.
What SAEBench then measures must be what it measures of the trained dictionaries. For those in SAELens's files it must
also be what it measures of SAELens's own object from the same files, which is the only comparison where each token is
normalised: no trained dictionary here does that.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import conformance_core as core
import torch
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path("foreign")
MODEL, HOOK, MODULE, LENGTH = "gpt2", "blocks.2.hook_resid_pre", "h.1", 128
"""The hook point of training, and transformers' module whose output that is."""
PER_TOKEN = 0.1
"""About √d_in ÷ the mean norm of an activation: by this, weights for raw activations suit normalised ones."""
OBJECT = ", SAELens's object"
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Converted:
    """A dictionary in another toolkit's files.

    Attributes:
        original: the architecture of the trained dictionary that it is made of.
        write: its files, from weights of that dictionary; the path to load.
        saelens: whether SAELens reads them.
        equal: whether it is the same function.
    """

    original: str
    write: Callable[[Weights, Any, Path], Path]
    saelens: bool = False
    equal: bool = True


def saelens(w: Weights, dictionary: Any, folder: Path) -> Path:
    """SAELens's files of a JumpReLU that does not subtract b_dec."""
    w = {**w, "b_enc": w["b_enc"] - w["b_dec"] @ w["W_enc"]}
    return _saelens(w, folder, architecture="jumprelu", apply_b_dec_to_input=False)


def saelens_topk(w: Weights, dictionary: Any, folder: Path) -> Path:
    """SAELens's files of a TopK that ranks features by activation × norm of the decoder row."""
    return _saelens(w, folder, architecture="topk", k=dictionary.k, rescale_acts_by_decoder_norm=True)


def saelens_layer_norm(w: Weights, dictionary: Any, folder: Path) -> Path:
    """The same for activations of which each is normalised by itself."""
    factors = {"W_enc": 1 / PER_TOKEN, "W_dec": PER_TOKEN, "b_dec": PER_TOKEN}
    w = {name: tensor * factors.get(name, 1) for name, tensor in w.items()}
    settings = {"rescale_acts_by_decoder_norm": True, "normalize_activations": "layer_norm"}
    return _saelens(w, folder, architecture="topk", k=dictionary.k, **settings)


def _saelens(w: Weights, folder: Path, **settings: Any) -> Path:
    d_in, d_sae = w["W_enc"].shape
    metadata = {"sae_lens_version": "6.54.12", "model_name": MODEL, "hook_name": HOOK, "prepend_bos": True}
    common = {
        "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {**metadata, "context_size": LENGTH},
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps({**common, **settings}), encoding="utf-8")
    save_file(w, folder / "sae_weights.safetensors")
    return folder


def sparsify(w: Weights, dictionary: Any, folder: Path) -> Path:
    """sparsify's files of a TopK, which chooses features without regard to norms: its rows have norm 1."""
    norms = w["W_dec"].norm(dim=-1)
    place = folder / MODULE
    place.mkdir()
    tensors = {
        "encoder.weight": (w["W_enc"] * norms).T.contiguous(), "encoder.bias": w["b_enc"] * norms,
        "W_dec": w["W_dec"] / norms[:, None], "b_dec": w["b_dec"],
    }  # fmt: skip
    save_file(tensors, place / "sae.safetensors")
    d_in, d_sae = w["W_enc"].shape
    settings = {
        "activation": "topk", "expansion_factor": d_sae // d_in, "normalize_decoder": True, "num_latents": d_sae,
        "k": dictionary.k, "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": d_in,
    }  # fmt: skip
    (place / "cfg.json").write_text(json.dumps(settings), encoding="utf-8")
    run = {"model": MODEL, "ctx_len": LENGTH, "dataset": "text"}
    (folder / "config.json").write_text(json.dumps(run), encoding="utf-8")
    return place


def dictionary_learning(w: Weights, dictionary: Any, folder: Path) -> Path:
    """dictionary_learning's files of a GatedAutoEncoder."""
    tensors = {
        "encoder.weight": w["W_enc"].T.contiguous(), "decoder.weight": w["W_dec"].T.contiguous(),
        "decoder_bias": w["b_dec"], "r_mag": w["r_mag"], "gate_bias": w["b_gate"], "mag_bias": w["b_mag"],
    }  # fmt: skip
    torch.save(tensors, folder / "ae.pt")
    d_in, d_sae = w["W_enc"].shape
    trainer = {
        "dict_class": "GatedAutoEncoder", "activation_dim": d_in, "dict_size": d_sae, "layer": 1, "lm_name": MODEL,
        "submodule_name": "resid_post_layer_1",
    }  # fmt: skip
    settings = {"trainer": trainer, "buffer": {"ctx_len": LENGTH}}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


CONVERTED: dict[str, Converted] = {
    "SAELens's jumprelu": Converted("jumprelu", saelens, saelens=True),
    "SAELens's topk": Converted("topk", saelens_topk, saelens=True),
    "SAELens's topk, layer_norm": Converted("topk", saelens_layer_norm, saelens=True, equal=False),
    "sparsify's topk": Converted("topk", sparsify),
    "dictionary_learning's gated": Converted("gated", dictionary_learning),
}


def write_all(dictionaries: dict[str, Any]) -> dict[str, Path]:
    """Write the files; the path of each."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    paths = {}
    for name, converted in CONVERTED.items():
        original, folder = dictionaries[converted.original], FOLDER / name.replace("'s ", "-").replace(", ", "-")
        folder.mkdir(parents=True)
        paths[name] = converted.write(rescaled(original), original, folder)
    return paths


def rescaled(dictionary: Any) -> Weights:
    """A trained dictionary's weights with decoder rows of norm 0.5 to 2, and the encoder's the other way round."""
    w = {name: parameter.detach().clone() for name, parameter in dictionary.named_parameters()}
    norms = 0.5 * 4 ** torch.rand(dictionary.d_sae, generator=torch.Generator().manual_seed(0))
    if "threshold" in w:
        w["threshold"] = w["threshold"].expand(dictionary.d_sae)
    inverse = {name: w[name] / norms for name in ("W_enc", "b_enc", "b_gate", "b_mag", "threshold") if name in w}
    return {**w, **inverse, "W_dec": w["W_dec"] * norms[:, None]}


def remember_inputs(dictionary: Any) -> Any:
    """Have `decode` use the activations that `encode` was given last, as SAELens's objects do.

    A dictionary that normalises each token cannot decode without them, and SAEBench gives `decode` the features alone.
    """

    class Remembering(type(dictionary)):
        def encode(self, x: Tensor) -> Tensor:
            self.last = x
            return super().encode(x)

        def decode(self, features: Tensor) -> Tensor:
            return super().decode(features, like=self.last)

    dictionary.__class__ = Remembering
    return dictionary


def load_all(paths: dict[str, Path]) -> dict[str, Any]:
    """Ours of each, with the model's name that transformer-lens 3 knows."""
    import sae

    loaded = {name: sae.load(path) for name, path in paths.items()}
    for dictionary in loaded.values():
        dictionary.cfg.model_name = MODEL
    return {name: remember_inputs(d) if d.frame.needs_input else d for name, d in loaded.items()}


def theirs(path: Path) -> Any:
    """SAELens's own object from its files, as SAEBench prepares one that it loads itself."""
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    dictionary = SAE.load_from_disk(path)
    dictionary.fold_W_dec_norm()
    return dictionary


def run_all(originals: dict[str, Any], converted: dict[str, Any], paths: dict[str, Path]) -> dict[str, core.Numbers]:
    """SAEBench's core evaluation with its defaults, of the trained ones, ours, and SAELens's own objects."""
    used = {name: originals[name] for name in sorted({c.original for c in CONVERTED.values()})}
    objects = {name + OBJECT: theirs(paths[name]) for name, c in CONVERTED.items() if c.saelens}
    return core.run_core({**used, **converted, **objects}, core.CONVERTED)


def compared(name: str, numbers: dict[str, core.Numbers]) -> dict[str, dict[str, tuple[float, float]]]:
    """The numbers of one of ours, beside those of what it has to equal."""
    converted, ours = CONVERTED[name], numbers[name]
    others = {f"the trained {converted.original}": numbers[converted.original]} if converted.equal else {}
    if converted.saelens:
        others["SAELens's object"] = numbers[name + OBJECT]
    return {other: {key: (ours[key], of[key]) for key in core.PRINTED} for other, of in others.items()}


def check_core(name: str, numbers: dict[str, core.Numbers]) -> str:
    """All numbers are those of the trained dictionary, and of SAELens's own object."""
    worst = {other: core.worst(pairs) for other, pairs in compared(name, numbers).items()}
    found = [f"within {off:.0e} of {other}" if off else f"the same as {other}" for other, off in worst.items()]
    return f"{len(core.PRINTED)} numbers {' and '.join(found)}"


def tables(numbers: dict[str, core.Numbers]) -> list[str]:
    """SAEBench's numbers of the trained ones and of ours: a line a number, a column a dictionary."""
    numbers = {name: of for name, of in numbers.items() if not name.endswith(OBJECT)}
    lines = [f"| | {' | '.join(numbers)} |", f"|---|{'--:|' * len(numbers)}"]
    lines += [f"| {key} | {' | '.join(f'{of[key]:.5g}' for of in numbers.values())} |" for key in core.PRINTED]
    return ["SAEBench's core evaluation by its defaults", "", *lines]
