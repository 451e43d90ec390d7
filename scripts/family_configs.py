"""Settings of tiny models of many families, beside `SMALL`; by `model_type`."""

from __future__ import annotations

from typing import Any

VOCABULARY = 96

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
MHA = {"num_key_value_heads": 4}
HEAD = {"head_dim": 8}
MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ATTENTION_AND_WINDOW = ["full_attention", "sliding_attention"] * 2
LINEAR_AND_ATTENTION = ["linear_attention", "full_attention"] * 2
MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
DEEPSEEK = {
    **MLA, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 24,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
SSM2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": MHA,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 4},
    "gptj": {"rotary_dim": 8},
    "gpt_neox": MHA,
    "gpt_bigcode": {},
    "codegen": {"rotary_dim": 4, "n_ctx": 64},
    "bloom": {},
    "falcon": {},
    "mpt": {"expansion_ratio": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "xglm": {"ffn_dim": 48},
    "openai-gpt": MHA,
    "llama": {},
    "mistral": {"sliding_window": 4},
    "ministral3": {},
    "mixtral": LOCAL,
    "gemma": HEAD,
    "gemma2": {**HEAD, "sliding_window": 4},
    "gemma3_text": {**HEAD, "sliding_window": 4, "layer_types": ATTENTION_AND_WINDOW},
    "gemma4_text": {
        **HEAD,
        "layer_types": ATTENTION_AND_WINDOW,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 8,
    },
    "qwen2": {},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 24},
    "qwen3": HEAD,
    "qwen3_moe": {**MOE, **HEAD},
    "qwen3_next": {**HEAD, **MOE, **LINEAR, "shared_expert_intermediate_size": 24, "layer_types": LINEAR_AND_ATTENTION},
    "qwen3_5_text": {**HEAD, **LINEAR, "layer_types": LINEAR_AND_ATTENTION},
    "qwen3_5_moe_text": {
        **HEAD,
        **MOE,
        **LINEAR,
        "shared_expert_intermediate_size": 24,
        "layer_types": LINEAR_AND_ATTENTION,
    },
    "phi": {},
    "phi3": {},
    "gpt_oss": {**HEAD, **LOCAL, "sliding_window": 4, "layer_types": ATTENTION_AND_WINDOW},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 4},
    "olmoe": MOE,
    "flex_olmo": MOE,
    "olmo_hybrid": {**LINEAR, "layer_types": LINEAR_AND_ATTENTION},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2, "chunk_size": 8},
    "falcon_mamba": {"state_size": 8},
    "falcon_h1": {**SSM2, "mamba_d_ssm": 64, "mamba_chunk_size": 8},
    "jamba": {
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "bamba": {**SSM2, "attn_layer_indices": [1, 3], "mamba_chunk_size": 8},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "granite": {},
    "granitemoe": LOCAL,
    "granitemoehybrid": {
        "position_embedding_type": "rope",
        **LOCAL,
        **SSM2,
        "shared_intermediate_size": 24,
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_chunk_size": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {**MOE, "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "cohere": {},
    "cohere2": {"sliding_window": 4},
    "stablelm": {},
    "starcoder2": {},
    "nemotron": {},
    "glm": HEAD,
    "glm4": HEAD,
    "glm4_moe": {**DEEPSEEK, "head_dim": 8, "num_key_value_heads": 2},
    "deepseek_v2": {**DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": DEEPSEEK,
    "exaone4": {"sliding_window": 4},
    "ernie4_5": {},
    "ernie4_5_moe": {**MOE, "moe_num_experts": 4, "moe_k": 2},
    "smollm3": {},
    "arcee": {},
    "apertus": {},
    "hunyuan_v1_dense": HEAD,
    "minimax_m2": {**LOCAL, **HEAD},
    "seed_oss": HEAD,
    "modernbert-decoder": {"local_attention": 4},
    "bitnet": {},
    "llama4_text": {**HEAD, **LOCAL, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2},
    "jetmoe": LOCAL,
    "recurrent_gemma": {},
    "afmoe": {**MOE, **HEAD},
    "nanochat": HEAD,
    "jais2": {},
    "vaultgemma": HEAD,
}
