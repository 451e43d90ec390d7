"""Dictionaries in the files of other toolkits, each with its toolkit's formula written down plainly.

Keys, shapes and formulas are facts about the formats; `scripts/conformance_formats.py` checks them against the
packages themselves.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.support.foreign_saelens import saelens
from tests.support.foreign_weights import (
    D_IN,
    D_OUT,
    D_SAE,
    Case,
    Forward,
    K,
    largest,
    layer_normed,
    narrow,
    save_json,
    save_pickle,
    save_tensors,
    weights,
)


def sparsify(module: str = "layers.10", transcode: bool = False, unit: bool = True, skip: bool = False) -> Case:
    w = weights(unit=unit)
    settings = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": 0, "k": K,
        "multi_topk": False, "skip_connection": skip, "transcode": transcode, "d_in": D_IN,
    }  # fmt: skip

    def write(folder: Path) -> Path:
        place = folder / module
        save_json(folder / "config.json", {"model": "HuggingFaceTB/SmolLM2-135M", "ctx_len": 2048, "dataset": "text"})
        save_json(place / "cfg.json", settings)
        tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
        save_tensors(place / "sae.safetensors", tensors | ({"W_skip": w["W_skip"]} if skip else {}))
        return place

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        f = largest(((x if transcode else x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu(), K)
        x_hat = f @ w["W_dec"] + w["b_dec"]
        return f, x_hat + x @ w["W_skip"].T if skip else x_hat

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


def openai(topk: bool = False) -> Case:
    w = weights(unit=False)
    content = {
        "pre_bias": w["b_dec"], "encoder.weight": w["W_enc"].T, "latent_bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T, "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.int64),
        "latents_activation_frequency": torch.ones(D_SAE),
        "latents_mean_square": torch.ones(D_SAE), "activation": "TopK" if topk else "ReLU",
        "activation_state_dict": {"k": K, "postact_fn": "ReLU"} if topk else {},
    }  # fmt: skip

    def write(folder: Path) -> Path:
        path = folder / f"resid_delta_mlp_v{5 if topk else 4}{'_32k' * topk}" / "autoencoders" / "8.pt"
        save_pickle(path, content)
        return path

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        if topk:
            y, std, mean = layer_normed(x)
            f = largest((y - w["b_dec"]) @ w["W_enc"] + w["b_enc"], K).relu()
            return f, (f @ w["W_dec"] + w["b_dec"]) * std + mean
        f = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
        return f, f @ w["W_dec"] + w["b_dec"]

    return Case(write, forward, exact_features=topk, metadata={"hook": "blocks.8.hook_mlp_out", "model": "gpt2"})


def uncentred_jumprelu(x: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    h = x @ w["W_enc"] + w["b_enc"]
    f = h.relu() * (h > w["threshold"])
    return f, f @ w["W_dec"] + w["b_dec"]


def with_skip(forward: Forward, W_skip: Tensor) -> Forward:
    """The formula with a linear map of the input added, W_skip by output."""

    def forward_with_skip(x: Tensor) -> tuple[Tensor, Tensor]:
        f, x_hat = forward(x)
        return f, x_hat + x @ W_skip.T

    return forward_with_skip


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


def gemma_scope_2(kind: str = "resid_post", model: str = "gemma-v3-270m-pt", affine: bool = False) -> Case:
    w = narrow(weights()) if affine else weights()

    def write(folder: Path) -> Path:
        place = folder / kind / f"layer_9_width_16k_l0_medium{'_affine' * affine}"
        tensors = {name.lower(): w[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
        tensors |= {"affine_skip_connection": w["W_skip"].T} if affine else {}
        save_tensors(place / "params.safetensors", tensors)
        save_json(place / "config.json", {"architecture": "jump_relu", "model_name": model, "type": kind})
        return place

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return uncentred_jumprelu(x, w)

    return Case(write, with_skip(forward, w["W_skip"]) if affine else forward, metadata={
        "hook": "blocks.9.mlp.hook_in" if kind == "transcoder" else "blocks.9.hook_resid_post",
        "target": "blocks.9.hook_mlp_out" if kind == "transcoder" else None,
        "model": "google/gemma-3-270m" if "270m" in model else "google/gemma-3-1b-pt",
    })  # fmt: skip


def llama_scope(transcoder: bool = False) -> Case:
    """The authors' loader: scale, norms and threshold as they fold them."""
    w = weights(unit=False)
    norm_in, norm_out, threshold = 1.7, 2.9 if transcoder else 1.7, 0.4
    a, o = D_IN**0.5 / norm_in, D_IN**0.5 / norm_out
    hook, target = ("ln2.hook_normalized", "hook_mlp_out") if transcoder else ("hook_resid_post", "hook_resid_post")
    settings = {
        "d_model": D_IN, "d_sae": D_SAE, "jump_relu_threshold": threshold,
        "hook_point_in": f"blocks.5.{hook}", "hook_point_out": f"blocks.5.{target}",
        "dataset_average_activation_norm": {"in": norm_in, "out": norm_out},
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
        b_enc, b_dec, W_dec = w["b_enc"] / a, w["b_dec"] / o, w["W_dec"] * a / o
        norms = W_dec.norm(dim=-1)
        h = x @ (w["W_enc"] * norms) + b_enc * norms
        f = h.relu() * (h > threshold)
        return f, f @ (W_dec / norms[:, None]) + b_dec

    return Case(write, forward, metadata={
        "hook": f"blocks.5.{hook}", "target": f"blocks.5.{target}" if transcoder else None,
        "model": "meta-llama/Llama-3.1-8B",
    })  # fmt: skip


def llamascopium(kind: str, norm: str = "dataset-wise", ranked: bool = True, pickle: bool = False) -> Case:
    """Its formula in training: scale, encode, choose by activation × decoder norm, decode, scale back."""
    w = weights(unit=False)
    hook, target = "blocks.5.hook_resid_mid", "blocks.5.hook_mlp_out" if norm == "dataset-wise" else None
    norms = {hook: 1.7, target or hook: 2.9 if target else 1.7}
    settings = {
        "sae_type": "sae", "d_model": D_IN, "expansion_factor": D_SAE / D_IN, "act_fn": kind, "top_k": K,
        "norm_activation": norm, "sparsity_include_decoder_norm": ranked, "use_decoder_bias": True,
        "use_glu_encoder": False, "hook_point_in": hook, "hook_point_out": target or hook,
    }  # fmt: skip
    tensors = {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]}
    tensors |= {f"dataset_average_activation_norm.{name}": torch.tensor(norm_of) for name, norm_of in norms.items()}
    theta = w["threshold"]
    if kind == "jumprelu":
        tensors["activation_function.log_jumprelu_threshold"] = theta.log()

    def write(folder: Path) -> Path:
        save_json(folder / "config.json", settings)
        if pickle:
            save_pickle(folder / "checkpoints" / "final.pt", {"sae": tensors, "version": "2"})
        else:
            save_tensors(folder / "sae_weights.safetensors", tensors)
        return folder

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        a = o = torch.ones(1, dtype=x.dtype)
        if norm == "dataset-wise":
            a, o = (D_IN**0.5 / torch.tensor(norms[name]).double() for name in (hook, target or hook))
        elif norm == "token-wise":
            a = o = D_IN**0.5 / x.norm(dim=-1, keepdim=True)
        h = (a * x) @ w["W_enc"] + w["b_enc"]
        z = h * w["W_dec"].norm(dim=-1) if ranked else h
        if kind == "topk":
            z = largest(z.relu(), K)
        elif kind == "jumprelu":
            z = z * (z > theta)
        f = z.relu() / w["W_dec"].norm(dim=-1) if ranked else z.relu()
        return f, (f @ w["W_dec"] + w["b_dec"]) / o

    return Case(write, forward, exact_features=False, metadata={"hook": hook, "target": target})


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


def circuit_tracer(jumprelu: bool, skip: bool = False) -> Case:
    w = narrow(weights()) if skip else weights()

    def write(folder: Path) -> Path:
        settings = "model_kind: transcoder_set\nmodel_name: gpt2\nfeature_input_hook: mlp.hook_in\n"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(settings + "feature_output_hook: mlp.hook_out\n", encoding="utf-8")
        tensors = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
        extra = {"activation_function.threshold": w["threshold"]} if jumprelu else {}
        extra |= {"W_skip": w["W_skip"]} if skip else {}
        save_tensors(folder / "layer_2.safetensors", {**tensors, **extra})
        return folder / "layer_2.safetensors"

    used = w if jumprelu else {**w, "threshold": torch.zeros(D_SAE)}

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return uncentred_jumprelu(x, used)

    return Case(write, with_skip(forward, w["W_skip"]) if skip else forward, metadata={
        "hook": "blocks.2.mlp.hook_in", "target": "blocks.2.hook_mlp_out", "model": "gpt2",
    })  # fmt: skip


PLAIN = ("standard", "jumprelu", "gated", "topk", "abstopk")
CASES: dict[str, Case] = {
    **{f"saelens {name}": saelens(name) for name in PLAIN},
    **{f"saelens {name}": saelens(name) for name in ("transcoder", "jumprelu_transcoder")},
    **{f"saelens {name}, norms": saelens(name, unit=False) for name in PLAIN},
    "saelens topk, ranked by norm": saelens("topk", unit=False, rescale_acts_by_decoder_norm=True),
    "saelens standard, not centred": saelens("standard", apply_b_dec_to_input=False),
    "saelens gated, not centred": saelens("gated", apply_b_dec_to_input=False),
    **{f"saelens {name}, {norm}": saelens(name, normalize_activations=norm)
       for name, norm in (("topk", "layer_norm"), ("gated", "layer_norm"), ("standard", "constant_norm_rescale"))},
    "saelens jumprelu, layer_norm, norms": saelens("jumprelu", unit=False, normalize_activations="layer_norm"),
    **{f"saelens {name}": saelens(name) for name in ("skip_transcoder", "jumprelu_skip_transcoder")},
    **{f"saelens {name}, other width": saelens(name, d_out=D_OUT)
       for name in ("transcoder", "jumprelu_skip_transcoder")},
    "saelens matching_pursuit": saelens("matching_pursuit"),
    "saelens matching_pursuit, 3 steps": saelens("matching_pursuit", max_iterations=3, stop_on_duplicate_support=False),
    "saelens matching_pursuit, threshold": saelens("matching_pursuit", residual_threshold=1.5, unit=False),
    "saelens before 6": saelens("standard", legacy=True),
    "sparsify": sparsify(),
    "sparsify transcoder": sparsify("layers.3.mlp", transcode=True, unit=False),
    "sparsify transcoder of a block": sparsify("layers.3", transcode=True),
    "sparsify, skip": sparsify(skip=True),
    "sparsify transcoder, skip": sparsify("layers.3.mlp", transcode=True, skip=True),
    **{f"dictionary_learning {kind}": dictionary_learning(kind)
       for kind in ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
                    "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder")},
    "dictionary_learning AutoEncoder, norms": dictionary_learning("AutoEncoder", unit=False),
    "dictionary_learning BatchTopKSAE, norms": dictionary_learning("BatchTopKSAE", unit=False),
    "dictionary_learning BatchTopKSAE, threshold never set": dictionary_learning("BatchTopKSAE", threshold=-1.0),
    "openai": openai(),
    "openai topk": openai(topk=True),
    "gemma scope": gemma_scope(),
    "gemma scope 2": gemma_scope_2(),
    "gemma scope 2 transcoder": gemma_scope_2("transcoder", "google/gemma-v3-1b-pt"),
    "gemma scope 2 affine transcoder": gemma_scope_2("transcoder", "google/gemma-v3-1b-pt", affine=True),
    "llama scope": llama_scope(),
    "llama scope transcoder": llama_scope(transcoder=True),
    **{f"llamascopium {kind}": llamascopium(kind) for kind in ("relu", "topk", "jumprelu")},
    "llamascopium jumprelu, not ranked": llamascopium("jumprelu", ranked=False),
    "llamascopium topk, not ranked": llamascopium("topk", ranked=False, pickle=True),
    "llamascopium topk, token-wise": llamascopium("topk", "token-wise"),
    "llamascopium jumprelu, inference": llamascopium("jumprelu", "inference"),
    "qwen scope": qwen_scope(),
    "circuit-tracer": circuit_tracer(jumprelu=False),
    "circuit-tracer jumprelu": circuit_tracer(jumprelu=True),
    "circuit-tracer skip": circuit_tracer(jumprelu=False, skip=True),
}  # fmt: skip
