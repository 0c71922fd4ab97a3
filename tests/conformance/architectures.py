"""Tiny random configurations of every model type that was measured, six blocks each.

`TINY[model_type]` are the keyword arguments of that type's configuration class. `EXACT` are the
types that must split exactly; `REFUSED` those that must be refused, with a piece of the reason.
"""

from __future__ import annotations

from typing import Any

BLOCKS = 6
VOCABULARY = 128

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 128}
_FULL_HEADS = {**_COMMON, "num_key_value_heads": 4, "intermediate_size": 128}
_HEAD_DIM = {**_GROUPED, "head_dim": 16}
_SLIDING = {**_HEAD_DIM, "sliding_window": 8}
_MOE = {**_HEAD_DIM, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {
    **_FULL_HEADS,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_LINEAR = {
    **_HEAD_DIM,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}

TINY: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "gpt_neox": {**_COMMON, "intermediate_size": 128},
    "mistral": _SLIDING,
    "qwen2": _GROUPED,
    "qwen3": _HEAD_DIM,
    "gemma": _HEAD_DIM,
    "gemma2": {**_SLIDING, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_SLIDING, "query_pre_attn_scalar": 16},
    "phi": _FULL_HEADS,
    "phi3": _GROUPED,
    "mixtral": {**_HEAD_DIM, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _MOE,
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 32},
    "olmo2": _GROUPED,
    "olmo3": {**_GROUPED, "sliding_window": 8},
    "granite": _GROUPED,
    "deepseek_v2": {**_LATENT, "topk_method": "greedy"},
    "deepseek_v3": _LATENT,
    "gpt_oss": {**_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "starcoder2": {**_GROUPED, "sliding_window": 8},
    "cohere": _GROUPED,
    "cohere2": {**_SLIDING},
    "glm4": {**_HEAD_DIM, "partial_rotary_factor": 0.5},
    "glm4_moe": {
        **_MOE,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "smollm3": _GROUPED,
    "exaone4": {**_GROUPED, "sliding_window": 8, "sliding_window_pattern": 4},
    "ministral": _SLIDING,
    "qwen3_next": {**_LINEAR, **_MOE, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": _LINEAR,
    "gpt2": _COMMON,
    "opt": {**_COMMON, "ffn_dim": 128, "word_embed_proj_dim": 32},
    "bloom": _COMMON,
    "falcon": {**_COMMON, "multi_query": True, "new_decoder_architecture": False},
    "gptj": {**_COMMON, "rotary_dim": 8},
    "gpt_neo": {
        **_COMMON,
        "attention_types": [[["global", "local"], 3]],
        "window_size": 8,
        "intermediate_size": 128,
    },
    "mpt": {**_COMMON, "max_seq_len": 128, "expansion_ratio": 2},
    "codegen": {**_COMMON, "rotary_dim": 8},
    "stablelm": _GROUPED,
    "llama4_text": {
        **_HEAD_DIM,
        "intermediate_size_mlp": 128,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 8,
    },
    "olmoe": {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron": _GROUPED,
    "gpt_bigcode": _COMMON,
    "xglm": {**_COMMON, "ffn_dim": 128},
    "jamba": {
        **_GROUPED,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
    "lfm2": {**_GROUPED, "full_attn_idxs": [1, 4], "block_multiple_of": 16},
    "mamba": {**_COMMON, "state_size": 8, "time_step_rank": 8},
    "mamba2": {
        **_COMMON,
        "state_size": 16,
        "num_heads": 8,
        "head_dim": 16,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "falcon_mamba": {**_COMMON, "state_size": 8, "time_step_rank": 8},
    "recurrent_gemma": {
        **_GROUPED,
        "lru_width": 64,
        "attention_window_size": 8,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "minimax": {**_HEAD_DIM, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 8},
    "bamba": {**_GROUPED, **_MAMBA2, "attn_layer_indices": [1, 4]},
    "falcon_h1": {**_HEAD_DIM, **_MAMBA2, "mamba_d_ssm": 128},
    "rwkv": {**_COMMON, "attention_hidden_size": 64, "intermediate_size": 128},
    "zamba2": {
        **_FULL_HEADS,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "mamba_d_state": 16,
        "mamba_ngroups": 1,
        "chunk_size": 8,
        "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid", "mamba", "mamba", "hybrid", "mamba"],
    },
    "gemma3n_text": {
        **_SLIDING,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * BLOCKS,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "gemma4_text": {
        **_SLIDING,
        "vocab_size_per_layer_input": VOCABULARY,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
}

REFUSED: dict[str, str] = {
    "recurrent_gemma": "temporal_block",
    "minimax": "cache of its own",
    "bamba": "unpack",
    "falcon_h1": "mamba",
    "rwkv": "attention",
    "zamba2": "a forward pass over spans differs",
    "gemma3n_text": "hidden states of shape",
    "gemma4_text": "weight",
}
EXACT = [model_type for model_type in TINY if model_type not in REFUSED]

# Transformers' own default configuration of these types builds no model that runs.
BROKEN_DEFAULTS = {"deepseek_v2", "ministral", "nemotron"}
