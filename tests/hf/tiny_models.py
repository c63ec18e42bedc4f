"""Tiny random models of transformers, one of each family of the table."""

from __future__ import annotations

import numpy as np

COMMON = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "intermediate_size": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
DEEPSEEK = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
KIMI = {
    "num_experts": 8,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 12,
    "num_shared_experts": 2,
    "num_expert_group": 4,
    "topk_group": 2,
    "layer_types": ["full_attention"] * 2,
}

#: By model_type, or with a variant after a slash: what differs from COMMON.
MODELS = {
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN | {"shared_expert_intermediate_size": 20},
    "qwen3_moe": QWEN | {"norm_topk_prob": True},
    "qwen3_moe/weights not renormalized": QWEN,
    "qwen3_next": QWEN
    | {
        "shared_expert_intermediate_size": 20,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "olmoe": QWEN,
    "deepseek_v2": DEEPSEEK | LATENT | {"topk_method": "group_limited_greedy"},
    "deepseek_v2/lite": DEEPSEEK
    | LATENT
    | {"topk_method": "greedy", "q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "deepseek_v3": DEEPSEEK | LATENT,
    "glm4_moe": DEEPSEEK | {"n_group": 1, "topk_group": 1},
    "minimax_m2": MIXTRAL | {"rotary_dim": 4},
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_intermediate_size": 12,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
    },
    "gpt_oss": MIXTRAL | {"sliding_window": 8},
    "llama4_text": MIXTRAL
    | {"num_experts_per_tok": 1, "intermediate_size_mlp": 20, "interleave_moe_layer_step": 1},
    "granitemoe": MIXTRAL,
    "dbrx": {
        "d_model": 16,
        "n_heads": 2,
        "n_layers": 2,
        "max_seq_len": 64,
        "vocab_size": 32,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": 16,
            "ffn_hidden_size": 24,
            "moe_num_experts": 8,
            "moe_top_k": 2,
        },
    },
    "jamba": QWEN
    | {
        "attn_layer_period": 2,
        "attn_layer_offset": 0,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "use_mamba_kernels": False,
        "mamba_d_state": 4,
        "mamba_expand": 1,
        "mamba_dt_rank": 4,
    },
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2},
    "lfm2_moe": QWEN | {"num_dense_layers": 1, "layer_types": ["full_attention"] * 2},
    "minimax": MIXTRAL | {"layer_types": ["full_attention"] * 2},
    "flex_olmo": QWEN,
    "dots1": DEEPSEEK,
    "deepseek_v32": DEEPSEEK | LATENT | {"index_n_heads": 2, "index_head_dim": 8},
    "glm4_moe_lite": DEEPSEEK | LATENT,
    "glm_moe_dsa": DEEPSEEK | LATENT | {"index_n_heads": 2, "index_head_dim": 8},
    "solar_open": DEEPSEEK,
    "exaone_moe": QWEN,
    "hy_v3": QWEN,
    "mimo_v2_flash": DEEPSEEK,
    "mellum": QWEN,
    "qwen3_vl_moe_text": QWEN,
    "lara_mini": QWEN | {"shared_expert_intermediate_size": 20},
    "glm4v_moe_text": DEEPSEEK,
    "mistral4": DEEPSEEK | LATENT | {"first_k_dense_replace": 0},
    "kimi_linear": KIMI | LATENT,
    "bailing_hybrid": KIMI | LATENT | {"first_k_dense_replace": 0},
    "afmoe": QWEN | {"num_dense_layers": 1, "num_shared_experts": 2, "route_scale": 1.5},
    "aria_text": {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 2},
    "phimoe": MIXTRAL | {"router_jitter_noise": 0.2},
    "longcat_flash": LATENT
    | {
        "n_routed_experts": 8,
        "zero_expert_num": 4,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 12,
        "num_layers": 2,
        "ffn_hidden_size": 24,
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 12,
        "layer_types": ["full_attention"] * 2,
        "hidden_size_per_layer_input": 0,
    },
    "switch_transformers": {
        "d_model": 16,
        "d_ff": 24,
        "d_kv": 8,
        "num_heads": 2,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_experts": 8,
        "expert_capacity": 1,
    },
    "nemotron_h": DEEPSEEK
    | {
        "moe_shared_expert_intermediate_size": 20,
        "layers_block_type": ["moe", "mlp"],
        "num_hidden_layers": 2,
        "mamba_num_heads": 2,
        "mamba_head_dim": 8,
        "n_groups": 1,
    },
    "granitemoeshared": MIXTRAL | {"shared_intermediate_size": 20},
    "granitemoehybrid": MIXTRAL
    | {"shared_intermediate_size": 20, "mamba_n_heads": 2, "layer_types": ["attention"] * 2},
    "qwen3_5_moe_text": QWEN | {"shared_expert_intermediate_size": 20},
    "axk2": DEEPSEEK
    | LATENT
    | {"n_group": None, "topk_group": None, "index_n_heads": 2, "index_head_dim": 8},
    "beam": QWEN | {"n_group": 4, "topk_group": 2, "mlp_layer_types": ["dense", "sparse"]},
    "cohere2_moe": QWEN,
    "cohere2_moe/sigmoid": QWEN
    | {
        "expert_selection_fn": "sigmoid",
        "num_shared_experts": 2,
        "shared_expert_combination_strategy": "sum",
    },
    "cohere2_moe/sigmoid, weights not renormalized": QWEN
    | {"expert_selection_fn": "sigmoid", "norm_topk_prob": False},
    "flint": QWEN | {"shared_expert_intermediate_size": 20, "mlp_only_layers": [0]},
    "laguna": QWEN | {"shared_expert_intermediate_size": 20, "moe_routed_scaling_factor": 1.5},
    "qwen3_omni_moe_thinker": {
        "text_config": COMMON | QWEN,
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [],
        },
        "audio_config": {
            "d_model": 16,
            "encoder_layers": 1,
            "encoder_ffn_dim": 24,
            "encoder_attention_heads": 2,
            "downsample_hidden_size": 8,
            "output_dim": 16,
        },
    },
    "step3p7": {
        "text_config": COMMON
        | {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "share_expert_dim": 20,
            "moe_router_scaling_factor": 1.5,
            "mlp_layer_types": ["dense", "sparse"],
            "swiglu_limits": [7.0, 0.0],
            "swiglu_limits_shared": [7.0, None],
        },
        "vision_config": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
        },
    },
}


#: The largest values of settings in models for fixtures, which are files of a few KB.
SMALL = {
    "hidden_size": 8,
    "d_model": 8,
    "d_ff": 6,
    "intermediate_size": 6,
    "ffn_hidden_size": 6,
    "moe_intermediate_size": 4,
    "shared_expert_intermediate_size": 6,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "zero_expert_num": 2,
    "expert_ffn_hidden_size": 4,
    "n_group": 2,
    "topk_group": 1,
    "share_expert_dim": 6,
}


def shrink(settings: dict) -> dict:
    """The settings with the values of :data:`SMALL`."""
    return {
        name: shrink(value)
        if isinstance(value, dict)
        else min(value, SMALL[name])
        if name in SMALL and value is not None
        else value
        for name, value in settings.items()
    }


def make(name: str, seed: int, small: bool = False):
    """The model, all of whose parameters and biases are random."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
    )

    model_type = name.split("/")[0]
    settings = MODELS[name]
    if not settings.keys() & {"d_model", "text_config"}:
        settings = COMMON | settings
    settings = shrink(settings) if small else settings
    config = AutoConfig.for_model(model_type, **settings)
    known = (
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForImageTextToText,
        AutoModel,
    )
    auto = next(kind for kind in known if type(config) in kind._model_mapping)
    # "eager" is a loop over the experts, for any sizes.
    model = auto.from_config(config, experts_implementation="eager")
    model = model.float().eval()
    generator = torch.Generator().manual_seed(seed)
    for _, array in (*model.named_parameters(), *model.named_buffers()):
        if array.is_floating_point():
            scale = max(array.shape[-1], 1) ** -0.5 if array.ndim >= 2 else 0.3
            array.data = torch.randn(array.shape, generator=generator) * scale
    return model


def output_and_gradients(function, x: np.ndarray, weight: np.ndarray):
    """The output for ``x`` and the gradient of ``sum(output * weight)``; parameters get theirs."""
    import torch

    x = torch.tensor(x, requires_grad=True)
    y = function(x)
    (y * torch.tensor(weight)).sum().backward()
    return y.detach().numpy(), x.grad.numpy()


def replace_by_gradients(model) -> None:
    """Replaces each parameter by its gradient, zero where it has none."""
    import torch

    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
