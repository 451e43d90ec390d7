"""Dictionaries in the files of other toolkits, each with its toolkit's formula written down plainly.

Keys, shapes and formulas are facts about the formats; `scripts/conformance_formats.py` checks them against the
packages themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE, K = 6, 20, 3
Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From activations to features, in the file's own units, and reconstructions."""


@dataclass
class Case:
    """A dictionary in another toolkit's files.

    Attributes:
        write: writes the files into a folder, and returns what is to be loaded.
        forward: its toolkit's formula.
        exact_features: whether features are the same numbers here; otherwise decoder norms are folded.
        metadata: what is to be known of it.
    """

    write: Callable[[Path], Path]
    forward: Forward
    exact_features: bool = True
    metadata: dict[str, Any] = field(default_factory=dict)


def weights(seed: int = 5, *, unit: bool = True, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random weights in the orientation x @ W_enc, f @ W_dec."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    W_dec = draw(D_SAE, D_IN)
    W_dec /= W_dec.norm(dim=-1, keepdim=True)
    if not unit:
        W_dec *= 0.5 + torch.rand(D_SAE, 1, generator=generator, dtype=torch.float64) * 2
    parts = {
        "W_enc": draw(D_IN, D_SAE), "b_enc": 0.3 * draw(D_SAE), "W_dec": W_dec, "b_dec": draw(D_IN),
        "threshold": draw(D_SAE).abs(), "b_gate": draw(D_SAE), "b_mag": draw(D_SAE), "r_mag": 0.3 * draw(D_SAE),
    }  # fmt: skip
    return {name: x.to(dtype) for name, x in parts.items()}


def largest(h: Tensor, k: int, ranks: Tensor | None = None) -> Tensor:
    """h where it is among the k of the largest rank, elsewhere 0."""
    chosen = (h if ranks is None else ranks).topk(k, dim=-1).indices
    return torch.zeros_like(h).scatter(-1, chosen, h.gather(-1, chosen))


def save_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.contiguous() for name, x in tensors.items()}, path)


def save_pickle(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: x.contiguous() if isinstance(x, Tensor) else x for name, x in content.items()}, path)


def saelens(architecture: str, unit: bool = True, legacy: bool = False, **extra: Any) -> Case:
    w = weights(unit=unit)
    centred = extra.get("apply_b_dec_to_input", True)
    names = {
        "standard": ("b_enc",), "jumprelu": ("b_enc", "threshold"), "gated": ("b_gate", "b_mag", "r_mag"),
        "topk": ("b_enc",), "abstopk": ("b_enc",), "transcoder": ("b_enc",),
        "jumprelu_transcoder": ("b_enc", "threshold"),
    }[architecture]  # fmt: skip
    tensors = {name: w[name] for name in ("W_enc", "W_dec", "b_dec", *names)}
    if legacy:
        tensors["scaling_factor"] = torch.full((D_SAE,), 2.0, dtype=torch.float64)
    own = {"k": K} if "topk" in architecture else {}
    own |= {"d_out": D_IN} if "transcoder" in architecture else {}
    if legacy:
        settings = {
            "d_in": D_IN, "d_sae": D_SAE, "dtype": "float64", "model_name": "gpt2-small", "context_size": 128,
            "hook_point": "blocks.8.hook_resid_pre", "hook_point_head_index": None, "activation_fn_str": "relu",
            "dataset_path": "Skylion007/openwebtext", "normalize_activations": False,
            "model_from_pretrained_kwargs": {"center_writing_weights": True},
        }  # fmt: skip
    else:
        metadata = {
            "sae_lens_version": "6.54.12", "model_name": "gpt2-small", "hook_name": "blocks.8.hook_resid_pre",
            "context_size": 128, "prepend_bos": True, "dataset_path": "Skylion007/openwebtext",
            "exclude_special_tokens": [0, 50256], "seqpos_slice": [2, None],
            "model_from_pretrained_kwargs": {"center_writing_weights": True},
        }  # fmt: skip
        if "transcoder" in architecture:
            metadata |= {"hook_name": "blocks.8.mlp.hook_in", "hook_name_out": "blocks.8.hook_mlp_out"}
        settings = {
            "architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "dtype": "float64",
            "apply_b_dec_to_input": "transcoder" not in architecture, "normalize_activations": "none",
            "reshape_activations": "none", **own, **extra, "metadata": metadata,
        }  # fmt: skip

    def write(folder: Path) -> Path:
        save_json(folder / "cfg.json", settings)
        save_tensors(folder / "sae_weights.safetensors", tensors)
        return folder

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x - w["b_dec"] if centred and "transcoder" not in architecture else x
        norms = w["W_dec"].norm(dim=-1)
        if architecture == "gated":
            gate = y @ w["W_enc"] + w["b_gate"] > 0
            f = gate * (y @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
        else:
            h = y @ w["W_enc"] + w["b_enc"]
            if architecture == "abstopk":
                f = largest(h, K, h.abs())
            elif architecture == "topk":
                f = (
                    largest(h * norms, K).relu() / norms
                    if extra.get("rescale_acts_by_decoder_norm")
                    else largest(h, K).relu()
                )
            else:
                f = h.relu() * (h > w["threshold"]) if "jumprelu" in architecture else h.relu()
        return f, (2 * f if legacy else f) @ w["W_dec"] + w["b_dec"]

    exact = (unit or (architecture == "topk" and not extra)) and not legacy and architecture != "abstopk"
    hook = "blocks.8.mlp.hook_in" if "transcoder" in architecture else "blocks.8.hook_resid_pre"
    target = "blocks.8.hook_mlp_out" if "transcoder" in architecture else None
    known = {
        "hook": hook, "target": target, "context_length": 128, "model": "gpt2-small", "processing": "center_and_fold",
        "tokens": {
            "prepend_bos": True, "masked_positions": 0 if legacy else 2, "masked_ids": [] if legacy else [0, 50256],
        },
    }  # fmt: skip
    return Case(write, forward, exact, known)


def sparsify(module: str = "layers.10", transcode: bool = False, unit: bool = True) -> Case:
    w = weights(unit=unit)
    settings = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": 0, "k": K,
        "multi_topk": False, "skip_connection": False, "transcode": transcode, "d_in": D_IN,
    }  # fmt: skip

    def write(folder: Path) -> Path:
        place = folder / module
        save_json(folder / "config.json", {"model": "HuggingFaceTB/SmolLM2-135M", "ctx_len": 2048, "dataset": "text"})
        save_json(place / "cfg.json", settings)
        tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
        save_tensors(place / "sae.safetensors", tensors)
        return place

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        f = largest(((x if transcode else x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu(), K)
        return f, f @ w["W_dec"] + w["b_dec"]

    kinds = {"layers.3.mlp": ("mlp.hook_in", "hook_mlp_out"), "layers.3": ("hook_resid_pre", "hook_resid_post")}
    hook, target = "blocks.10.hook_resid_post", None
    if transcode:
        hook, target = (f"blocks.3.{kind}" for kind in kinds[module])
    model = "HuggingFaceTB/SmolLM2-135M"
    known = {"hook": hook, "target": target, "context_length": 2048, "model": model, "processing": "none"}
    return Case(write, forward, metadata=known)


def dictionary_learning(kind: str, unit: bool = True, threshold: float = 0.7) -> Case:
    w = weights(unit=unit)
    one = torch.tensor(threshold)
    encoder = {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T}
    plain = {name: w[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    sizes = {"k": torch.tensor(K, dtype=torch.int32), "threshold": one}
    tensors: dict[str, Tensor] = {
        "AutoEncoder": {**encoder, "encoder.bias": w["b_enc"], "bias": w["b_dec"]},
        "AutoEncoderNew": {**encoder, "encoder.bias": w["b_enc"], "decoder.bias": w["b_dec"]},
        "GatedAutoEncoder": {
            **encoder, "decoder_bias": w["b_dec"], "r_mag": w["r_mag"], "gate_bias": w["b_gate"],
            "mag_bias": w["b_mag"],
        },
        "AutoEncoderTopK": {**encoder, "encoder.bias": w["b_enc"], "b_dec": w["b_dec"], **sizes},
        "BatchTopKSAE": {**encoder, "encoder.bias": w["b_enc"], "b_dec": w["b_dec"], **sizes},
        "MatryoshkaBatchTopKSAE": {**plain, **sizes, "group_sizes": torch.tensor([5, 15])},
        "JumpReluAutoEncoder": {**plain, "threshold": w["threshold"]},
    }[kind]  # fmt: skip
    trainer = {"dict_class": kind, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 3,
               "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_3", "k": K}  # fmt: skip

    def write(folder: Path) -> Path:
        save_json(folder / "config.json", {"trainer": trainer, "buffer": {"ctx_len": 256}})
        save_pickle(folder / "ae.pt", tensors)
        return folder

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else x - w["b_dec"]
        h = y @ w["W_enc"] + w["b_enc"]
        if kind == "GatedAutoEncoder":
            f = (y @ w["W_enc"] + w["b_gate"] > 0) * (y @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
        elif kind == "AutoEncoderTopK":
            f = largest(h.relu(), K)
        elif kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
            f = h.relu() * (h.relu() > one)
        else:
            f = h.relu() * (h > w["threshold"]) if kind == "JumpReluAutoEncoder" else h.relu()
        return f, f @ w["W_dec"] + w["b_dec"]

    exact = unit or kind == "AutoEncoderTopK"
    return Case(write, forward, exact, {
        "hook": "blocks.3.hook_resid_post", "context_length": 256, "processing": "none",
        "model": "EleutherAI/pythia-70m",
    })  # fmt: skip


def openai() -> Case:
    w = weights(unit=False)
    content = {
        "pre_bias": w["b_dec"], "encoder.weight": w["W_enc"].T, "latent_bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T, "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.int64),
        "latents_activation_frequency": torch.ones(D_SAE),
        "latents_mean_square": torch.ones(D_SAE), "activation": "ReLU", "activation_state_dict": {},
    }  # fmt: skip

    def write(folder: Path) -> Path:
        path = folder / "resid_delta_mlp_v4" / "autoencoders" / "8.pt"
        save_pickle(path, content)
        return path

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        f = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
        return f, f @ w["W_dec"] + w["b_dec"]

    return Case(write, forward, exact_features=False, metadata={"hook": "blocks.8.hook_mlp_out", "model": "gpt2"})


def uncentred_jumprelu(x: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    h = x @ w["W_enc"] + w["b_enc"]
    f = h.relu() * (h > w["threshold"])
    return f, f @ w["W_dec"] + w["b_dec"]


def gemma_scope() -> Case:
    w = weights()

    def write(folder: Path) -> Path:
        place = folder / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
        place.mkdir(parents=True)
        names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
        np.savez(place / "params.npz", **{name: w[name].numpy() for name in names})  # pyright: ignore[reportArgumentType]
        return place

    return Case(write, lambda x: uncentred_jumprelu(x, w), metadata={
        "hook": "blocks.20.hook_resid_post", "model": "google/gemma-2-2b",
    })  # fmt: skip


def gemma_scope_2(kind: str = "resid_post", model: str = "gemma-v3-270m-pt") -> Case:
    w = weights()

    def write(folder: Path) -> Path:
        place = folder / kind / "layer_9_width_16k_l0_medium"
        tensors = {name.lower(): w[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
        save_tensors(place / "params.safetensors", tensors)
        save_json(place / "config.json", {"architecture": "jump_relu", "model_name": model, "type": kind})
        return place

    return Case(write, lambda x: uncentred_jumprelu(x, w), metadata={
        "hook": "blocks.9.mlp.hook_in" if kind == "transcoder" else "blocks.9.hook_resid_post",
        "target": "blocks.9.hook_mlp_out" if kind == "transcoder" else None,
        "model": "google/gemma-3-270m" if "270m" in model else "google/gemma-3-1b-pt",
    })  # fmt: skip


def llama_scope() -> Case:
    """The authors' loader: scale, norms and threshold as they fold them."""
    w = weights(unit=False)
    norm_in, threshold = 1.7, 0.4
    a = D_IN**0.5 / norm_in
    settings = {
        "d_model": D_IN, "d_sae": D_SAE, "jump_relu_threshold": threshold,
        "hook_point_in": "blocks.5.hook_resid_post", "hook_point_out": "blocks.5.hook_resid_post",
        "dataset_average_activation_norm": {"in": norm_in, "out": norm_in},
        "sparsity_include_decoder_norm": True, "norm_activation": "dataset-wise",
    }  # fmt: skip

    def write(folder: Path) -> Path:
        folder = folder / "Llama3_1-8B-Base-L5R-8x"
        save_json(folder / "hyperparams.json", settings)
        tensors = {
            "encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T,
            "decoder.bias": w["b_dec"],
        }  # fmt: skip
        save_tensors(folder / "checkpoints" / "final.safetensors", tensors)
        return folder

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        b_enc, b_dec, W_dec = w["b_enc"] / a, w["b_dec"] / a, w["W_dec"]  # W_dec · a / o, with a = o
        norms = W_dec.norm(dim=-1)
        h = x @ (w["W_enc"] * norms) + b_enc * norms
        f = h.relu() * (h > threshold)
        return f, f @ (W_dec / norms[:, None]) + b_dec

    return Case(write, forward, metadata={"hook": "blocks.5.hook_resid_post", "model": "meta-llama/Llama-3.1-8B"})


def qwen_scope() -> Case:
    w = weights(unit=False)

    def write(folder: Path) -> Path:
        path = folder / f"SAE-Res-Qwen3-1.7B-Base-W1K-L0_{K}" / "layer7.sae.pt"
        save_pickle(path, {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T, "b_enc": w["b_enc"], "b_dec": w["b_dec"]})
        return path

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        f = largest((x @ w["W_enc"] + w["b_enc"]).relu(), K)
        return f, f @ w["W_dec"] + w["b_dec"]

    return Case(write, forward, metadata={"hook": "blocks.7.hook_resid_post", "model": "Qwen/Qwen3-1.7B-Base"})


def circuit_tracer(jumprelu: bool) -> Case:
    w = weights()

    def write(folder: Path) -> Path:
        settings = "model_kind: transcoder_set\nmodel_name: gpt2\nfeature_input_hook: mlp.hook_in\n"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(settings + "feature_output_hook: mlp.hook_out\n", encoding="utf-8")
        tensors = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
        extra = {"activation_function.threshold": w["threshold"]} if jumprelu else {}
        save_tensors(folder / "layer_2.safetensors", {**tensors, **extra})
        return folder / "layer_2.safetensors"

    zero = {**w, "threshold": torch.zeros(D_SAE)}
    return Case(
        write, lambda x: uncentred_jumprelu(x, w if jumprelu else zero), metadata={
            "hook": "blocks.2.mlp.hook_in", "target": "blocks.2.hook_mlp_out", "model": "gpt2",
        }
    )  # fmt: skip


PLAIN = ("standard", "jumprelu", "gated", "topk", "abstopk")
CASES: dict[str, Case] = {
    **{f"saelens {name}": saelens(name) for name in PLAIN},
    **{f"saelens {name}": saelens(name) for name in ("transcoder", "jumprelu_transcoder")},
    **{f"saelens {name}, norms": saelens(name, unit=False) for name in PLAIN},
    "saelens topk, ranked by norm": saelens("topk", unit=False, rescale_acts_by_decoder_norm=True),
    "saelens standard, not centred": saelens("standard", apply_b_dec_to_input=False),
    "saelens gated, not centred": saelens("gated", apply_b_dec_to_input=False),
    "saelens before 6": saelens("standard", legacy=True),
    "sparsify": sparsify(),
    "sparsify transcoder": sparsify("layers.3.mlp", transcode=True, unit=False),
    "sparsify transcoder of a block": sparsify("layers.3", transcode=True),
    **{f"dictionary_learning {kind}": dictionary_learning(kind)
       for kind in ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
                    "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder")},
    "dictionary_learning AutoEncoder, norms": dictionary_learning("AutoEncoder", unit=False),
    "dictionary_learning BatchTopKSAE, norms": dictionary_learning("BatchTopKSAE", unit=False),
    "dictionary_learning BatchTopKSAE, threshold never set": dictionary_learning("BatchTopKSAE", threshold=-1.0),
    "openai": openai(),
    "gemma scope": gemma_scope(),
    "gemma scope 2": gemma_scope_2(),
    "gemma scope 2 transcoder": gemma_scope_2("transcoder", "google/gemma-v3-1b-pt"),
    "llama scope": llama_scope(),
    "qwen scope": qwen_scope(),
    "circuit-tracer": circuit_tracer(jumprelu=False),
    "circuit-tracer jumprelu": circuit_tracer(jumprelu=True),
}  # fmt: skip
