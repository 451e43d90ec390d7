"""Files of published dictionaries with random weights, and the authors' formulas, for scripts/conformance_scopes.py.

Names of repositories, paths, keys and shapes are facts about the published files; no other toolkit's code writes them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

SMALL_D_IN, SMALL_D_SAE, SMALL_D_OUT = 24, 160, 16
GEMMA, GEMMA_2, LLAMA, QWEN = (
    "google/gemma-2-2b",
    "google/gemma-3-270m",
    "meta-llama/Llama-3.1-8B",
    "Qwen/Qwen3-1.7B-Base",
)
Weights = dict[str, Tensor]
Files = dict[str, bytes]
Outputs = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A published dictionary.

    Attributes:
        release: its name, here and in SAELens's registry.
        id: the dictionary's in the registry.
        repository: on the hub.
        path: in the repository.
        write: its files, from weights.
        formula: the authors': activations times norms of decoder rows, and reconstructions.
        hooks: what it reads, and for a transcoder also what it gives.
        model: on the hub.
        sizes: d_in and d_sae as published.
        told: names in SAELens's settings of the sizes that its loader takes for granted.
        unit: whether decoder rows have norm 1.
        scale: what SAELens multiplies by before its numbers are those of the files: by d_in.
        average: the factor that SAELens's registry has for it; activations are so much smaller here.
        differs: how SAELens's formula differs from the authors'; empty: it does not.
    """

    release: str
    id: str
    repository: str
    path: str
    write: Callable[[Case, Weights], Files]
    formula: Callable[[Case, Weights, Tensor], Outputs]
    hooks: tuple[str, ...]
    model: str
    sizes: tuple[int, int]
    told: tuple[str, ...] = ()
    unit: bool = True
    scale: Callable[[int], float] = lambda d_in: 1.0
    average: float = 1.0
    differs: str = ""

    @property
    def ours(self) -> str:
        """Our name of it."""
        return f"{self.release}/{'layer0.sae.pt' if self.release.startswith('qwen') else self.id}"


def npz(case: Case, w: Weights) -> Files:
    """Gemma Scope's `params.npz`."""
    stream = io.BytesIO()
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    np.savez(stream, **{name: w[name].numpy() for name in names})  # pyright: ignore[reportArgumentType]
    return {f"{case.path}/params.npz": stream.getvalue()}


def by_gemma_scope(case: Case, w: Weights, x: Tensor) -> Outputs:
    """JumpReLU of an input that is not centred, and a linear map of the input if the name says so."""
    h = x @ w["W_enc"] + w["b_enc"]
    f = h.relu() * (h > w["threshold"])
    x_hat = f @ w["W_dec"] + w["b_dec"]
    return f * w["W_dec"].norm(dim=-1), x_hat + x @ w["W_skip"] if case.path.endswith("_affine") else x_hat


def gemma_scope_2(case: Case, w: Weights) -> Files:
    """Gemma Scope 2's `params.safetensors` with `config.json`."""
    tensors = {name.lower(): w[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    affine = case.path.endswith("_affine")
    if affine:
        tensors["affine_skip_connection"] = w["W_skip"]
    block, kind = f"model.layers.{case.path.partition('layer_')[2].partition('_')[0]}", case.path.partition("/")[0]
    points = {
        "resid_post": "output", "attn_out": "self_attn.o_proj.input", "mlp_out": "post_feedforward_layernorm.output",
    }.get(kind, "pre_feedforward_layernorm.output")  # fmt: skip
    settings = {
        "architecture": "jump_relu", "model_name": "gemma-v3-270m-pt", "hf_hook_point_in": f"{block}.{points}",
        "width": w["W_enc"].shape[1], "l0": 60, "affine_connection": affine, "type": "transcoder" if affine else "sae",
    }  # fmt: skip
    if len(case.hooks) == 2:
        settings["hf_hook_point_out"] = f"{block}.post_feedforward_layernorm.output"
    return {
        f"{case.path}/params.safetensors": save(tensors), f"{case.path}/config.json": json.dumps(settings).encode(),
    }  # fmt: skip


def without_settings(case: Case, w: Weights) -> Files:
    """The same where a folder has no `config.json`, and its names must do."""
    return {path: content for path, content in gemma_scope_2(case, w).items() if not path.endswith(".json")}


def llama_scope(case: Case, w: Weights) -> Files:
    """Llama Scope's `hyperparams.json` and `checkpoints/final.safetensors`."""
    d_in, d_sae = w["W_enc"].shape
    norm = d_in**0.5 / case.average
    settings = {
        "d_model": d_in, "d_sae": d_sae, "hook_point_in": case.hooks[0], "hook_point_out": case.hooks[0],
        "jump_relu_threshold": LLAMA_THRESHOLD / case.average, "norm_activation": "dataset-wise", "act_fn": "jumprelu",
        "dataset_average_activation_norm": {"in": norm, "out": norm}, "sparsity_include_decoder_norm": True,
    }  # fmt: skip
    tensors = {
        "encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(), "decoder.bias": w["b_dec"],
    }  # fmt: skip
    place = f"{case.path}/checkpoints/final.safetensors"
    return {place: save(tensors), f"{case.path}/hyperparams.json": json.dumps(settings).encode()}


LLAMA_THRESHOLD = 0.4
"""In units of scaled activations; the files have it in raw ones."""


def by_llama_scope(case: Case, w: Weights, x: Tensor) -> Outputs:
    """JumpReLU, after the scale and then the norms of decoder rows are folded; the threshold is in raw units."""
    norms = w["W_dec"].norm(dim=-1)
    h = (x @ w["W_enc"] + w["b_enc"] / case.average) * norms
    f = h.relu() * (h > LLAMA_THRESHOLD / case.average)
    return f, f @ (w["W_dec"] / norms[:, None]) + w["b_dec"] / case.average


def qwen_scope(case: Case, w: Weights) -> Files:
    """Qwen-Scope's `layerN.sae.pt`."""
    stream = io.BytesIO()
    tensors = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T, "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, stream)
    return {case.path: stream.getvalue()}


def by_qwen_scope(case: Case, w: Weights, x: Tensor) -> Outputs:
    """The 50 largest of each token, of those that are positive, of an input that is not centred."""
    h = (x @ w["W_enc"] + w["b_enc"]).relu()
    largest = h.topk(50, dim=-1)
    f = torch.zeros_like(h).scatter(-1, largest.indices, largest.values)
    return f * w["W_dec"].norm(dim=-1), f @ w["W_dec"] + w["b_dec"]


def saelens_before_6(case: Case, w: Weights) -> Files:
    """SAELens's old files, whose registry alone has the scale."""
    settings = {
        "architecture": "standard", "d_in": w["W_enc"].shape[0], "d_sae": w["W_enc"].shape[1], "dtype": "float32",
        "hook_point": case.hooks[0], "model_name": "gpt2-small", "normalize_activations": "expected_average_only_in",
    }  # fmt: skip
    tensors = {name: w[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    return {
        f"{case.path}/cfg.json": json.dumps(settings).encode(),
        f"{case.path}/sae_weights.safetensors": save(tensors),
    }


def openai_v5(case: Case, w: Weights) -> Files:
    """OpenAI's TopK in SAELens's old files."""
    settings = {
        "d_in": w["W_enc"].shape[0], "d_sae": w["W_enc"].shape[1], "dtype": "float32", "hook_name": case.hooks[0],
        "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 32}, "normalize_activations": "layer_norm",
        "apply_b_dec_to_input": True, "model_name": "gpt2-small",
    }  # fmt: skip
    tensors = {name: w[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    return {
        f"{case.path}/cfg.json": json.dumps(settings).encode(),
        f"{case.path}/sae_weights.safetensors": save(tensors),
    }


def by_openai(case: Case, w: Weights, x: Tensor) -> Outputs:
    """The 32 largest of each token, after layer norm, which is undone afterwards."""
    mean, std = x.mean(dim=-1, keepdim=True), x.std(dim=-1, keepdim=True)
    y = (x - mean) / (std + 1e-5)
    h = ((y - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    largest = h.topk(32, dim=-1)
    f = torch.zeros_like(h).scatter(-1, largest.indices, largest.values)
    return f * w["W_dec"].norm(dim=-1), (f @ w["W_dec"] + w["b_dec"]) * std + mean


def by_saelens(case: Case, w: Weights, x: Tensor) -> Outputs:
    """ReLU of a scaled and then centred input, scaled back."""
    f = ((case.average * x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    return f * w["W_dec"].norm(dim=-1) / case.average, (f @ w["W_dec"] + w["b_dec"]) / case.average


def cases() -> Iterator[Case]:
    """The dictionaries that are compared."""
    sizes = ("d_in", "d_sae")
    for kind, id, d_in, told, hooks in (
        ("res", "layer_20/width_16k/average_l0_71", 2304, sizes, ("blocks.20.hook_resid_post",)),
        ("mlp", "layer_0/width_16k/average_l0_119", 2304, sizes, ("blocks.0.hook_mlp_out",)),
        ("att", "layer_0/width_16k/average_l0_104", 2048, sizes, ("blocks.0.attn.hook_z",)),
        ("transcoders", "layer_0/width_16k/average_l0_76", 2304, (*sizes, "d_out"),
         ("blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out")),
    ):  # fmt: skip
        name = f"gemma-scope-2b-pt-{kind}"
        yield Case(name, id, f"google/{name}", id, npz, by_gemma_scope, hooks, GEMMA, (d_in, 16384), told)
    name, id = "gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6"
    yield Case(
        name, id, f"google/{name}", id, npz, by_gemma_scope, (), GEMMA, (2304, 4096), sizes,
        scale=lambda d_in: d_in**0.5, differs="does not scale b_dec",
    )  # fmt: skip
    twelfth, transcoder = "layer_12_width_16k_l0_big", ("blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out")
    for kind, folder, id, hooks, write in (
        ("res", "resid_post", twelfth, ("blocks.12.hook_resid_post",), gemma_scope_2),
        ("att", "attn_out", twelfth, ("blocks.12.attn.hook_z",), gemma_scope_2),
        ("mlp", "mlp_out", twelfth, ("blocks.12.hook_mlp_out",), without_settings),
        ("transcoders-all", "transcoder_all", "layer_0_width_16k_l0_big", transcoder, gemma_scope_2),
        ("transcoders-all", "transcoder_all", "layer_0_width_16k_l0_big_affine", transcoder, gemma_scope_2),
    ):
        name, repository = f"gemma-scope-2-270m-pt-{kind}", "google/gemma-scope-2-270m-pt"
        path, d_in = f"{folder}/{id}", 1024 if kind == "att" else 640
        yield Case(name, id, repository, path, write, by_gemma_scope, hooks, GEMMA_2, (d_in, 16384))
    for place, block, kind, average, differs in (
        ("r", 0, "hook_resid_post", 58.935251798561154, ""),
        ("m", 0, "hook_mlp_out", 80.31372549019608, ""),
        ("a", 0, "hook_attn_out", 112.21917808219177, ""),
        ("r", 31, "hook_resid_post", 0.8590604026845637, "leaves out the norms of decoder rows"),
    ):
        part = place.upper()
        yield Case(
            f"llama_scope_lx{place}_8x", f"l{block}{place}_8x", f"fnlp/Llama3_1-8B-Base-LX{part}-8x",
            f"Llama3_1-8B-Base-L{block}{part}-8x", llama_scope, by_llama_scope, (f"blocks.{block}.{kind}",), LLAMA,
            (4096, 32768), unit=not differs, average=average, differs=differs,
        )  # fmt: skip
    yield Case(
        "qwen-scope-3-1.7b-base-w32k-l50", "layer0", "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", "layer0.sae.pt",
        qwen_scope, by_qwen_scope, ("blocks.0.hook_resid_post",), QWEN, (2048, 32768), sizes, unit=False,
    )  # fmt: skip
    id = "blocks.3.hook_mlp_out"
    yield Case(
        "gpt2-small-mlp-tm", id, "tommmcgrath/gpt2-small-mlp-out-saes", "sae_group_gpt2_blocks.3.hook_mlp_out_24576:v0",
        saelens_before_6, by_saelens, (id,), "gpt2", (768, 24576), unit=False, average=1.8958522157897557,
    )  # fmt: skip
    yield Case(
        "gpt2-small-mlp-out-v5-32k", id, "jbloom/GPT2-Small-OAI-v5-32k-mlp-out-SAEs", "v5_32k_layer_3", openai_v5,
        by_openai, (id,), "gpt2", (768, 32768), unit=False,
    )  # fmt: skip


def weights(case: Case, dtype: torch.dtype, real: bool, seed: int) -> Weights:
    """Random weights with numbers of float32, in which some loaders read every file."""
    generator = torch.Generator().manual_seed(seed)
    d_in, d_sae = case.sizes if real else (SMALL_D_IN, SMALL_D_SAE)
    # Gemma Scope 2's loader takes all sizes from the files
    d_out = SMALL_D_OUT if case.repository.endswith("2-270m-pt") and len(case.hooks) == 2 and not real else d_in

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(d_sae, generator=generator)

    rows = normal(d_sae, d_out)
    lengths = torch.ones(d_sae) if case.unit else between(0.5, 2.0)
    made = {
        "W_enc": normal(d_in, d_sae) * d_in**-0.5, "b_enc": 0.3 * normal(d_sae), "b_dec": normal(d_out),
        "W_dec": rows * (lengths / rows.norm(dim=-1))[:, None], "threshold": between(0.2, 1.2),
        "W_skip": normal(d_in, d_out) * d_in**-0.5,
    }  # fmt: skip
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def inputs(case: Case, w: Weights, rows: int, seed: int) -> Tensor:
    """Random activations in SAELens's units, with which some features of a dictionary fire."""
    d_in, dtype = w["W_enc"].shape[0], w["W_enc"].dtype
    x = torch.randn(rows, d_in, generator=torch.Generator().manual_seed(1000 + seed))
    return (x / case.average * case.scale(d_in)).to(dtype)
