"""A tiny random Llama as a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def write_gguf(path: Path, tokenizer_of: Path, seed: int = 0) -> Path:
    """Two blocks of width 32, matrices in 8 bits, with the byte-level BPE of a model folder."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    tokenizer = json.loads((tokenizer_of / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    specials = {token["content"] for token in tokenizer["added_tokens"]}
    width, heads, inner, layers = 32, 2, 64, 2
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(width // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in specials else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(vocabulary.index(min(specials)))
    writer.add_eos_token_id(vocabulary.index(min(specials)))
    rng = np.random.default_rng([9, seed])
    matrices = {"token_embd": (len(vocabulary), width), "output": (len(vocabulary), width)}
    for layer in range(layers):
        matrices |= {f"blk.{layer}.attn_{name}": (width, width) for name in ("q", "k", "v", "output")}
        matrices |= {f"blk.{layer}.ffn_{name}": (inner, width) for name in ("gate", "up")}
        matrices[f"blk.{layer}.ffn_down"] = (width, inner)
    for name, shape in matrices.items():
        weights = rng.normal(0, 0.3, shape).astype(np.float32)
        kind = GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", quants.quantize(weights, kind), raw_dtype=kind)
    for name in ["output_norm", *(f"blk.{layer}.{part}_norm" for layer in range(layers) for part in ("attn", "ffn"))]:
        writer.add_tensor(f"{name}.weight", rng.normal(1, 0.2, width).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
