"""From ``config.json`` to a model's settings, by its ``model_type``.

The settings of the MoE blocks are not here: ``MoE.from_hf`` has them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from models import rope
from models.attention import GroupedQueries
from models.latent_attention import Latents


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """A decoder of L layers.

    Attributes:
      vocabulary: token ids.
      width: H.
      norm_eps: of the norms.
      tied: whether the logits are made with the embedding.
      attention: of every layer.
      windows: of each layer the positions that a query attends to; None: all before it.
      dense_width: hidden width of an MLP where a layer has no experts.
      moe_layers: for each layer whether it is an MoE.
      stop_ids: tokens that end a text.
    """

    vocabulary: int
    width: int
    norm_eps: float
    tied: bool
    attention: GroupedQueries | Latents
    windows: tuple[int | None, ...]
    dense_width: int
    moe_layers: tuple[bool, ...]
    stop_ids: tuple[int, ...]


def from_config(config: dict) -> ModelSettings:
    """The settings of the model that ``config.json`` describes.

    Raises:
      ValueError: its ``model_type`` is none of those here, or a setting is not supported.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"config.json: model_type {kind!r} is none of {', '.join(FAMILIES)}.")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json: hidden_act must be 'silu', got {config['hidden_act']!r}.")
    family = FAMILIES[kind]
    layers = config["num_hidden_layers"]
    stop = config.get("eos_token_id")
    return ModelSettings(
        vocabulary=config["vocab_size"],
        width=config["hidden_size"],
        norm_eps=config.get("rms_norm_eps", family.norm_eps),
        tied=config.get("tie_word_embeddings", False),
        attention=family.attention(config),
        windows=tuple(family.window(config, i) for i in range(layers)),
        dense_width=config["intermediate_size"],
        moe_layers=tuple(family.is_moe(config, i) for i in range(layers)),
        stop_ids=() if stop is None else tuple(stop) if isinstance(stop, list) else (stop,),
    )


def _grouped(rope_default, **options):
    """Attention with grouped queries; ``options`` are fixed, or functions of the config."""

    def attention(config):
        heads = config["num_attention_heads"]
        head_width = config.get("head_dim") or config["hidden_size"] // heads
        return GroupedQueries(
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_width=head_width,
            rope=rope.from_config(config, head_width, rope_default),
            **{name: o(config) if callable(o) else o for name, o in options.items()},
        )

    return attention


def _latents(config):
    width = config["qk_rope_head_dim"]
    interleaved = config.get("rope_interleave", True)
    return Latents(
        heads=config["num_attention_heads"],
        query_rank=config["q_lora_rank"],
        latent_width=config["kv_lora_rank"],
        plain_width=config["qk_nope_head_dim"],
        rope_width=width,
        value_width=config["v_head_dim"],
        rope=rope.from_config(config, width, {"rope_theta": 10000.0}, interleaved),
        biases=config.get("attention_bias", False),
    )


def _no_window(config, layer):
    return None


def _one_window(config, layer):
    return config.get("sliding_window")


def _window_on_request(config, layer):
    return config.get("sliding_window") if config.get("use_sliding_window") else None


def _every_other_window(config, layer):
    """Layers 0, 2, ... have the window, unless the file says of each layer what it has."""
    kinds = config.get("layer_types")
    sliding = layer % 2 == 0 if kinds is None else kinds[layer] == "sliding_attention"
    return config.get("sliding_window", 128) if sliding else None


def _all_moe(config, layer):
    return True


def _moe_by_step(config, layer):
    step = config.get("decoder_sparse_step", 1)
    return layer not in (config.get("mlp_only_layers") or []) and (layer + 1) % step == 0


def _moe_after_dense(config, layer):
    return layer >= config.get("first_k_dense_replace", 3)


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family's settings follow from its config.

    Attributes:
      attention: (config) -> the attention's settings.
      norm_eps: where the config has none.
      window: (config, layer) -> positions that a query attends to, or None.
      is_moe: (config, layer) -> whether the layer is an MoE.
    """

    attention: Callable
    norm_eps: float
    window: Callable = _no_window
    is_moe: Callable = _all_moe


def _biases(default):
    return lambda config: config.get("attention_bias", default)


_YARN_OF_GPT_OSS = {
    "rope_theta": 150000.0,
    "rope_type": "yarn",
    "factor": 32.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

FAMILIES = {
    "mixtral": Family(_grouped({"rope_theta": 1e6}), 1e-5, window=_one_window),
    "qwen3_moe": Family(
        _grouped({"rope_theta": 10000.0}, norm="head", biases=_biases(False)),
        1e-6,
        window=_window_on_request,
        is_moe=_moe_by_step,
    ),
    "olmoe": Family(
        _grouped(
            {"rope_theta": 10000.0},
            norm="all",
            biases=_biases(False),
            clip=lambda config: config.get("clip_qkv"),
        ),
        1e-5,
    ),
    "deepseek_v3": Family(_latents, 1e-6, is_moe=_moe_after_dense),
    "gpt_oss": Family(
        _grouped(_YARN_OF_GPT_OSS, sinks=True, biases=_biases(True)),
        1e-5,
        window=_every_other_window,
    ),
}
