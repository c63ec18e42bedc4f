"""Tiny checkpoints with random weights, in the form of the public ones."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tokenizers

from freeio_jax.hf import safetensors
from models import weights

_END = "<|end|>"
_COMMON = {
    "vocab_size": 257,  # bytes, and the end
    "eos_token_id": 256,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}

#: ``config.json`` of each family, smaller than real ones in every dimension. Windows and original
#: contexts are shorter than a prompt, so that they have an effect.
CONFIGS = {
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 2,
        "rope_theta": 1e6,
        "sliding_window": 6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_theta": 1e6,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 1,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    "olmoe": {
        "architectures": ["OlmoeForCausalLM"],
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 4,
        "rope_theta": 10000.0,
        "clip_qkv": 1.0,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 4,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 8,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
        },
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "n_routed_experts": 16,
        "n_shared_experts": 2,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 12,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "attention_bias": True,
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "swiglu_limit": 7.0,
    },
}


def config_of(family: str, **changes) -> dict:
    """The ``config.json`` of a family's tiny model."""
    return {"model_type": family} | _COMMON | CONFIGS[family] | changes


def write_checkpoint(folder: Path, config: dict, seed: int = 0) -> None:
    """Writes ``config.json``, ``model.safetensors`` and ``tokenizer.json``, with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = {name: _draw(name, shape, seed) for name, shape in tensor_shapes(config).items()}
    safetensors.write(folder / "model.safetensors", tensors)
    _byte_tokenizer().save(str(folder / "tokenizer.json"))


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the checkpoint."""
    model = weights.shapes_of(config, mesh=None, dtype=jnp.float32)
    shapes = {
        name: parameter.shape[::-1] if transposed else parameter.shape
        for _, name, parameter, transposed in weights.dense_parameters(model)
    }
    for i, is_moe in enumerate(model.settings.moe_layers):
        if is_moe:
            block = _MOE_SHAPES[config["model_type"]](config)
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def _matrices(prefix, names, width, hidden):
    """SwiGLU's gate, up and down."""
    gate, up, down = names
    shapes = {gate: (hidden, width), up: (hidden, width), down: (width, hidden)}
    return {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}


def _experts(prefix, names, number, width, hidden):
    shapes = {}
    for e in range(number):
        shapes |= _matrices(f"{prefix}.experts.{e}", names, width, hidden)
    return shapes


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _mixtral(config):
    width, hidden, experts = (
        config[name] for name in ("hidden_size", "intermediate_size", "num_local_experts")
    )
    prefix = "block_sparse_moe"
    gate = {f"{prefix}.gate.weight": (experts, width)}
    return gate | _experts(prefix, ("w1", "w3", "w2"), experts, width, hidden)


def _one_by_one(config):
    width, experts = config["hidden_size"], config["num_experts"]
    hidden = config.get("moe_intermediate_size", config["intermediate_size"])
    gate = {"mlp.gate.weight": (experts, width)}
    return gate | _experts("mlp", _PROJECTIONS, experts, width, hidden)


def _deepseek_v3(config):
    width, hidden, experts = (
        config[name] for name in ("hidden_size", "moe_intermediate_size", "n_routed_experts")
    )
    gate = {
        "mlp.gate.weight": (experts, width),
        "mlp.gate.e_score_correction_bias": (experts,),
    }
    shared = config["n_shared_experts"] * hidden
    return (
        gate
        | _experts("mlp", _PROJECTIONS, experts, width, hidden)
        | _matrices("mlp.shared_experts", _PROJECTIONS, width, shared)
    )


def _gpt_oss(config):
    width, hidden, experts = (
        config[name] for name in ("hidden_size", "intermediate_size", "num_local_experts")
    )
    return {
        "mlp.router.weight": (experts, width),
        "mlp.router.bias": (experts,),
        "mlp.experts.gate_up_proj": (experts, width, 2 * hidden),
        "mlp.experts.gate_up_proj_bias": (experts, 2 * hidden),
        "mlp.experts.down_proj": (experts, hidden, width),
        "mlp.experts.down_proj_bias": (experts, width),
    }


_MOE_SHAPES = {
    "mixtral": _mixtral,
    "qwen3_moe": _one_by_one,
    "olmoe": _one_by_one,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
}


def _draw(name, shape, seed):
    """Random values of a size that suits the tensor; the same ones for the same name and seed.

    Of numpy's generators this one is frozen: each version draws the same numbers.
    """
    random = np.random.RandomState(zlib.crc32(f"{seed} {name}".encode()))
    values = random.standard_normal(shape).astype(np.float32)
    if "norm" in name:
        return 1 + values / 4
    if len(shape) == 1 or name.endswith("bias"):
        return values / 4
    if "embed" in name:
        return values
    fan_in = shape[-2] if "experts.gate_up" in name or "experts.down" in name else shape[-1]
    return values * np.float32(1.4 / math.sqrt(fan_in))


def _byte_tokenizer():
    """One token for each byte, and one for the end of a text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(_END, special=True)])
    return tokenizer
