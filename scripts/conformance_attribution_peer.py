"""Attribution graphs of circuit-tracer with transcoders that we wrote, for scripts/conformance_attribution.py.

    PYTHON conformance_attribution_peer.py FOLDER

PYTHON is that of an environment with circuit-tracer (decoderesearch/circuit-tracer) and without this toolkit. Each
`*/*/set` in FOLDER is loaded by circuit-tracer's own loader and put into a random model of GPT-2's shape, of which
`attribute` makes a graph; `graph.pt` next to the set gets what it says.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

LAYERS, D_MODEL, VOCABULARY, PROMPT = 3, 12, 20, [0, 3, 7, 11, 5, 2]


def tokenizer(folder: str) -> Any:
    """A tokenizer of as many words, the first of which begins a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, **{f"w{number}": number for number in range(1, VOCABULARY)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<s>")
    PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def load(folder: Path, dtype: torch.dtype) -> Any:
    """A set by circuit-tracer's loader. From a folder, it reads neither `activation` nor `k`: for TopK, it is told."""
    from circuit_tracer.utils.hf_utils import (  # pyright: ignore[reportMissingImports]
        load_transcoder_from_hub,
        load_transcoders,
    )

    device, lazily = torch.device("cpu"), folder.parent.name.endswith("lazy")
    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    lazy = {"lazy_encoder": lazily, "lazy_decoder": lazily}
    if settings.get("activation") != "topk":
        return load_transcoder_from_hub(str(folder), device=device, dtype=dtype, **lazy)[0]
    paths = [str(folder / f"layer_{layer}.safetensors") for layer in range(LAYERS)]
    return load_transcoders({**settings, "transcoders": paths, "scan": str(folder)}, device, dtype, **lazy)


def model_with(transcoders: Any, dtype: torch.dtype) -> Any:
    """A random model with biases everywhere, and the transcoders."""
    from circuit_tracer import ReplacementModel  # pyright: ignore[reportMissingImports]
    from transformer_lens import HookedTransformerConfig

    settings: Any = HookedTransformerConfig  # another class in newer versions
    config = settings.from_dict({
        "n_layers": LAYERS, "d_model": D_MODEL, "n_ctx": 16, "d_head": 4, "n_heads": 3, "d_mlp": 24,
        "d_vocab": VOCABULARY, "act_fn": "gelu_new", "normalization_type": "LN", "model_name": "gpt2", "dtype": dtype,
        "positional_embedding_type": "standard", "device": "cpu",
    })  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model: Any = ReplacementModel.from_config(config, transcoders, tokenizer=tokenizer(folder))
    generator = torch.Generator().manual_seed(0)
    own = {name: value for name, value in model.named_parameters() if not name.startswith("transcoders")}
    for name, value in own.items():
        scale = 0.3 if value.ndim > 1 or name.endswith(".b") else 0.1
        shift = 1 if name.endswith(".w") else 0
        value.data = shift + scale * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(dtype)
    return model


@torch.no_grad()
def constant(model: Any, tokens: Tensor) -> Tensor:
    """Logits of the last token with every node of the graph set to 0, and attention and norms' scales as they are.

    What is left comes from no node: biases, positions, b_dec, and the MLPs at the first position, which
    circuit-tracer leaves out.
    """
    sides = {side: f"blocks.{{}}.{getattr(model, name)}" for side, name in SIDES.items()}
    _, cache = model.run_with_cache(tokens)
    frozen = [name for name in cache if name.endswith(("hook_pattern", "hook_scale"))]
    hooks: list[Any] = [(name, lambda value, hook: cache[hook.name]) for name in frozen]
    hooks.append(("hook_embed", lambda value, hook: torch.zeros_like(value)))
    for layer, transcoder in enumerate(model.transcoders):
        skip = transcoder.compute_skip if transcoder.W_skip is not None else torch.zeros_like
        rest = transcoder.b_dec.expand_as(cache[sides["gives"].format(layer)]).clone()
        rest[:, 0] = (cache[sides["gives"].format(layer)] - skip(cache[sides["reads"].format(layer)]))[:, 0]
        inputs: dict[str, Tensor] = {}
        hooks.append((sides["reads"].format(layer), lambda value, hook, inputs=inputs: inputs.update(x=value)))
        hooks.append((
            sides["gives"].format(layer),
            lambda value, hook, inputs=inputs, rest=rest, skip=skip: skip(inputs["x"]) + rest,
        ))  # fmt: skip
    return model.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1]


SIDES = {"reads": "feature_input_hook", "gives": "original_feature_output_hook"}


def graph_of(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """What the graph of a set's model says, and what it should add up to."""
    from circuit_tracer import attribute  # pyright: ignore[reportMissingImports]

    model, tokens = model_with(load(folder, dtype), dtype), torch.tensor(PROMPT)
    graph = attribute(tokens, model, max_n_logits=5, desired_logit_prob=0.999, batch_size=8)
    chosen = torch.tensor([target.vocab_idx for target in graph.logit_targets])
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
        reads = [cache[f"blocks.{layer}.{model.feature_input_hook}"][0] for layer in range(LAYERS)]
        layers = [model.transcoders[layer] for layer in range(LAYERS)]
        features = [transcoder.encode(x) for transcoder, x in zip(layers, reads, strict=True)]
        decoded = [transcoder.decode(f, x) for transcoder, f, x in zip(layers, features, reads, strict=True)]
        norms = [transcoder.W_dec.norm(dim=-1) for transcoder in layers]
    fixed, value = constant(model, tokens), logits[0, -1]
    return {
        "inputs": reads,
        "strengths": [f * norm for f, norm in zip(features, norms, strict=True)],
        "reconstructions": decoded,
        "active": graph.active_features[graph.selected_features],
        "activations": graph.activation_values[graph.selected_features],
        "edges": graph.adjacency_matrix[-len(chosen) :],
        # an edge into a logit is into its difference from the mean of all
        "totals": ((value - value.mean()) - (fixed - fixed.mean()))[chosen],
        "direct": ((model.unembed.W_U - model.unembed.W_U.mean(-1, keepdim=True))[:, chosen]).T,
        "gain": model.ln_final.w / cache["ln_final.hook_scale"][0, -1],
    }  # fmt: skip


def main() -> None:
    for folder in sorted(Path(sys.argv[1]).resolve().glob("*/*/set")):
        dtype = getattr(torch, folder.parents[1].name)
        torch.save(graph_of(folder, dtype), folder.with_name("graph.pt"))


if __name__ == "__main__":
    main()
