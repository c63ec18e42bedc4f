"""The table of model families: for each the settings of its MoE block, and its weights' names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from freeio_jax.flax.experts import MLP, Experts, SwiGLU, squared_relu

_REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Key:
    """A setting that config.json holds.

    Attributes:
      names: the first of these keys that config.json has; ``"a.b"`` is the key b of the object a.
      default: where it has none of them, the default of transformers. Without one that is an error.
      values: what each value of config.json means for the layer. None: the value itself. A value
        that is not among them cannot be expressed.
      only_if: another key and a value. Where that key has another value, the default holds.
    """

    names: tuple[str, ...]
    default: Any = _REQUIRED
    values: Mapping[Any, Any] | None = None
    only_if: tuple[Key, Any] | None = None

    @property
    def is_required(self) -> bool:
        """Whether config.json must have it."""
        return self.default is _REQUIRED


@dataclasses.dataclass(frozen=True)
class Product:
    """The product of several settings."""

    factors: tuple[Key, ...]


@dataclasses.dataclass(frozen=True)
class Only:
    """A setting for which the layer has one value, or a few.

    Attributes:
      key: the setting.
      allowed: its values that the layer can express.
      reason: what it means if it has another value.
    """

    key: Key
    allowed: tuple
    reason: str


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter of the layer in the files.

    Attributes:
      names: of the tensors whose columns, one after the other, are the parameter's columns; from
        the decoder layer on. With ``{expert}`` each expert has a tensor of its own. Without it the
        tensor of a parameter of all experts has a first dimension for them.
      transposed: whether the files have ``[out, in]``, as torch's Linear. The layer's are
        ``[in, out]``.
      flat: whether the dimension of the experts and the next one are a single one (DBRX).
    """

    names: tuple[str, ...]
    transposed: bool = True
    flat: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family of models needs.

    Attributes:
      title: its name for people.
      model_types: values of ``model_type`` in config.json.
      num_experts, top_k, expert_width, shared_expert_width: the layer's settings.
      shared_expert_gate: the layer's setting.
      width: H.
      router: settings of ``freeio_jax.flax.Router``; those that are not here are the defaults.
      experts: gives the experts from a function that looks settings up.
      activation: the name of the activation between the products.
      weights: where each parameter is in the files. Alternatives are tried in order.
      layer: where a decoder layer's tensors are, after one of :data:`BASES`.
      blocks: the modules in the model of transformers, after ``layer``, whose outputs' sum is the
        layer's output. The first one has the experts; others may be missing.
      only: settings that the layer can express with some values alone.
    """

    title: str
    model_types: tuple[str, ...]
    num_experts: Key
    top_k: Key
    expert_width: Key
    weights: Mapping[str, tuple[Weight, ...]]
    shared_expert_width: Key | Product | None = None
    shared_expert_gate: bool = False
    width: Key = Key(("hidden_size",))
    router: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    experts: Callable[[Callable[[Any], Any], Callable], Experts] | None = None
    activation: Key = Key(("hidden_act",), "silu")
    layer: str = "layers.{layer}."
    blocks: tuple[str, ...] = ("mlp",)
    only: tuple[Only, ...] = ()


#: What may come before ``Family.layer`` in the names of tensors: whole models, their text parts,
#: and a model without its head.
BASES = (
    "model.",
    "",
    "model.language_model.",
    "language_model.model.",
    "language_model.",
    "transformer.",
    "backbone.",
)


def exact_gelu(x: jax.Array) -> jax.Array:
    """GELU by the error function: Hugging Face's ``"gelu"``."""
    return jax.nn.gelu(x, approximate=False)


#: Functions of ``hidden_act``. ``jax.nn.gelu`` is the approximation by tanh.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu2": squared_relu,
    "gelu": exact_gelu,
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
}


def _key(*names, default=_REQUIRED, **options):
    return Key(names, default, **options)


def _linear(*names):
    return (Weight(names),)


def _as_is(*names):
    return (Weight(names, transposed=False),)


def _per_expert(prefix, gate="gate_proj", up="up_proj", down="down_proj"):
    """Each expert's own tensors; or those of all experts, as transformers has them in memory."""
    names = [f"{prefix}.experts.{{expert}}.{name}.weight" for name in (gate, up, down)]
    return {
        "gate_up": (Weight(tuple(names[:2])), Weight((f"{prefix}.experts.gate_up_proj",))),
        "down": (Weight(tuple(names[2:])), Weight((f"{prefix}.experts.down_proj",))),
    }


def _shared(prefix):
    return {
        "shared_gate_up": _linear(f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"),
        "shared_down": _linear(f"{prefix}.down_proj.weight"),
    }


_SOFTMAX_RENORMALIZED = {"renormalize": True}
_SOFTMAX_BY_CONFIG = {"renormalize": _key("norm_topk_prob", default=False)}
_EXPERTS_PER_TOKEN = _key("num_experts_per_tok")
_MOE_WIDTH = _key("moe_intermediate_size")
_MOE_FILES = {"router": _linear("mlp.gate.weight"), **_per_expert("mlp")}
_MIXTRAL_FILES = {
    "router": _linear("block_sparse_moe.gate.weight"),
    **_per_expert("block_sparse_moe", "w1", "w3", "w2"),
}
_QWEN_FILES = (
    _MOE_FILES
    | _shared("mlp.shared_expert")
    | {"shared_expert_gate": _linear("mlp.shared_expert_gate.weight")}
)
_DEEPSEEK_FILES = _MOE_FILES | _shared("mlp.shared_experts")
_SHARED_OF_DEEPSEEK = Product((_MOE_WIDTH, _key("n_shared_experts")))
_GRANITE_FILES = {
    "router": _linear("block_sparse_moe.router.layer.weight"),
    "gate_up": _linear("block_sparse_moe.input_linear.weight"),
    "down": _linear("block_sparse_moe.output_linear.weight"),
}


def _router_of_deepseek_v3(**defaults):
    """With the defaults of config.json's keys, where all models of a family share them."""
    renormalize, scale, groups, of_token = (
        _key(name, default=defaults.get(name, _REQUIRED))
        for name in ("norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group")
    )
    return {
        "score": "sigmoid",
        "renormalize": renormalize,
        "weight_scale": scale,
        "num_groups": groups,
        "groups_per_token": of_token,
        "bias_update_rate": 0.0,
    }


_WITHOUT_GROUPS = {"norm_topk_prob": True, "n_group": 1, "topk_group": 1}
_NO_BIAS_IN_MLP = Only(
    _key("use_bias", default=False), (False,), "a bias in the shared experts alone"
)


def _gpt_oss_experts(get, activation):
    return SwiGLU(
        limit=get(_key("swiglu_limit", default=7.0)),
        alpha=get(_key("swiglu_alpha", default=1.702)),
        biases=True,
        interleaved=True,
    )


def _without_gate(get, activation):
    return MLP(activation)


FAMILIES: tuple[Family, ...] = (
    Family(
        "Mixtral",
        ("mixtral",),
        num_experts=_key("num_local_experts", "num_experts", default=8),
        top_k=_key("num_experts_per_tok", default=2),
        expert_width=_key("intermediate_size", default=14336),
        router=_SOFTMAX_RENORMALIZED,
        weights=_MIXTRAL_FILES,
    ),
    Family(
        "MiniMax-01",
        ("minimax",),
        num_experts=_key("num_local_experts", "num_experts", default=8),
        top_k=_key("num_experts_per_tok", default=2),
        expert_width=_key("intermediate_size", default=14336),
        router=_SOFTMAX_RENORMALIZED,
        weights=_MIXTRAL_FILES,
    ),
    Family(
        "Qwen2-MoE, Qwen3-Next",
        ("qwen2_moe", "qwen3_next"),
        num_experts=_key("num_experts", "num_local_experts"),
        top_k=_EXPERTS_PER_TOKEN,
        expert_width=_MOE_WIDTH,
        shared_expert_width=_key("shared_expert_intermediate_size"),
        shared_expert_gate=True,
        router={"renormalize": _key("norm_topk_prob")},
        weights=_QWEN_FILES,
    ),
    Family(
        "Qwen3.5-MoE",
        ("qwen3_5_moe_text",),
        num_experts=_key("num_experts", "num_local_experts", default=256),
        top_k=_key("num_experts_per_tok", default=8),
        expert_width=_key("moe_intermediate_size", default=512),
        shared_expert_width=_key("shared_expert_intermediate_size", default=512),
        shared_expert_gate=True,
        router=_SOFTMAX_RENORMALIZED,
        weights=_QWEN_FILES,
    ),
    Family(
        "Qwen3-MoE",
        ("qwen3_moe",),
        num_experts=_key("num_experts", "num_local_experts", default=128),
        top_k=_key("num_experts_per_tok", default=8),
        expert_width=_key("moe_intermediate_size", default=768),
        router=_SOFTMAX_BY_CONFIG,
        weights=_MOE_FILES,
    ),
    Family(
        "OLMoE, FlexOlmo",
        ("olmoe", "flex_olmo"),
        num_experts=_key("num_experts", "num_local_experts"),
        top_k=_EXPERTS_PER_TOKEN,
        expert_width=_key("intermediate_size"),
        router=_SOFTMAX_BY_CONFIG,
        weights=_MOE_FILES,
    ),
    Family(
        "DeepSeek-V2",
        ("deepseek_v2",),
        num_experts=_key("n_routed_experts", "num_experts", default=64),
        top_k=_EXPERTS_PER_TOKEN,
        expert_width=_MOE_WIDTH,
        shared_expert_width=Product((_MOE_WIDTH, _key("n_shared_experts", default=2))),
        router={
            "renormalize": False,
            "weight_scale": _key("routed_scaling_factor", default=1.0),
            "group_score": "max",
            "num_groups": _key(
                "n_group",
                default=1,
                only_if=(_key("topk_method", default="greedy"), "group_limited_greedy"),
            ),
            "groups_per_token": _key(
                "topk_group",
                default=1,
                only_if=(_key("topk_method", default="greedy"), "group_limited_greedy"),
            ),
        },
        weights=_DEEPSEEK_FILES,
        only=(
            Only(
                _key("topk_method", default="greedy"),
                ("greedy", "group_limited_greedy"),
                "another choice of experts",
            ),
            Only(
                _key("norm_topk_prob", default=False),
                (False,),
                "weights that are renormalized, which transformers does not do in this family",
            ),
        ),
    ),
    Family(
        "DeepSeek-V3, V3.1, V3.2, R1, Kimi K2, GLM-4.5 to GLM-5, dots.llm1, Solar Open",
        (
            "deepseek_v3",
            "deepseek_v32",
            "kimi_k2",
            "glm4_moe",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "dots1",
            "solar_open",
        ),
        num_experts=_key("n_routed_experts", "num_local_experts"),
        top_k=_EXPERTS_PER_TOKEN,
        expert_width=_MOE_WIDTH,
        shared_expert_width=_SHARED_OF_DEEPSEEK,
        router=_router_of_deepseek_v3(),
        weights=_DEEPSEEK_FILES | {"bias": _as_is("mlp.gate.e_score_correction_bias")},
        only=(
            Only(
                _key("topk_method", default="noaux_tc"), ("noaux_tc",), "another choice of experts"
            ),
            Only(_key("scoring_func", default="sigmoid"), ("sigmoid",), "another score"),
        ),
    ),
    Family(
        "MiMo-V2-Flash",
        ("mimo_v2_flash",),
        num_experts=_key("n_routed_experts", default=256),
        top_k=_key("num_experts_per_tok", default=8),
        expert_width=_key("moe_intermediate_size", default=2048),
        router=_router_of_deepseek_v3(routed_scaling_factor=1.0, **_WITHOUT_GROUPS),
        weights=_MOE_FILES | {"bias": _as_is("mlp.gate.e_score_correction_bias")},
    ),
    Family(
        "EXAONE-MoE",
        ("exaone_moe",),
        num_experts=_key("num_experts", default=64),
        top_k=_key("num_experts_per_tok", default=8),
        expert_width=_key("moe_intermediate_size", default=1024),
        shared_expert_width=Product(
            (
                _key("moe_intermediate_size", default=1024),
                _key("num_shared_experts", default=1),
            )
        ),
        router=_router_of_deepseek_v3(routed_scaling_factor=2.5, **_WITHOUT_GROUPS),
        weights=_DEEPSEEK_FILES | {"bias": _as_is("mlp.e_score_correction_bias")},
    ),
    Family(
        "Hunyuan 3",
        ("hy_v3",),
        num_experts=_key("num_experts", default=192),
        top_k=_key("num_experts_per_tok", default=8),
        expert_width=_key("moe_intermediate_size", default=1536),
        shared_expert_width=Product(
            (
                _key("moe_intermediate_size", default=1536),
                _key("num_shared_experts", default=1),
            )
        ),
        router={
            "score": "sigmoid",
            "renormalize": True,
            "weight_scale": _key("router_scaling_factor", default=2.826),
            "bias_update_rate": 0.0,
        },
        weights={
            **_per_expert("mlp"),
            **_shared("mlp.shared_mlp"),
            "router": _linear("mlp.router.gate.weight"),
            "bias": _as_is("mlp.expert_bias"),
        },
    ),
    Family(
        "MiniMax-M2",
        ("minimax_m2",),
        num_experts=_key("num_local_experts", "num_experts", default=256),
        top_k=_key("num_experts_per_tok", default=8),
        expert_width=_key("intermediate_size", default=1536),
        router={"score": "sigmoid", "renormalize": True, "bias_update_rate": 0.0},
        weights=_MIXTRAL_FILES | {"bias": _as_is("block_sparse_moe.e_score_correction_bias")},
        only=(Only(_key("scoring_func", default="sigmoid"), ("sigmoid",), "another score"),),
    ),
    Family(
        "LFM2-MoE",
        ("lfm2_moe",),
        num_experts=_key("num_experts", default=32),
        top_k=_key("num_experts_per_tok", default=4),
        expert_width=_key("moe_intermediate_size", default=1792),
        router={
            "score": "sigmoid",
            "renormalize": _key("norm_topk_prob", default=True),
            "weight_scale": _key("routed_scaling_factor", default=1.0),
            "bias_update_rate": _key(
                "use_expert_bias", default=0.0, values={True: 0.0, False: None}
            ),
        },
        weights={
            "router": _linear("feed_forward.gate.weight"),
            "bias": _as_is("feed_forward.expert_bias"),
            **_per_expert("feed_forward", "w1", "w3", "w2"),
        },
        blocks=("feed_forward",),
    ),
    Family(
        "Ernie 4.5",
        ("ernie4_5_moe",),
        num_experts=_key("moe_num_experts", default=64),
        top_k=_key("moe_k", default=6),
        expert_width=_key("moe_intermediate_size", default=1536),
        shared_expert_width=Product(
            (
                _key("moe_intermediate_size", default=1536),
                _key("moe_num_shared_experts", default=2),
            )
        ),
        router={"renormalize": True, "bias_update_rate": 0.0},
        weights=_DEEPSEEK_FILES | {"bias": _as_is("mlp.moe_statics.e_score_correction_bias")},
        only=(_NO_BIAS_IN_MLP,),
    ),
    Family(
        "gpt-oss",
        ("gpt_oss",),
        num_experts=_key("num_local_experts", "num_experts", default=128),
        top_k=_key("num_experts_per_tok", default=4),
        expert_width=_key("intermediate_size", default=2880),
        router={"renormalize": True, "logits_bias": True},
        experts=_gpt_oss_experts,
        weights={
            "router": _linear("mlp.router.weight"),
            "router_bias": _as_is("mlp.router.bias"),
            "gate_up": _as_is("mlp.experts.gate_up_proj"),
            "gate_up_bias": _as_is("mlp.experts.gate_up_proj_bias"),
            "down": _as_is("mlp.experts.down_proj"),
            "down_bias": _as_is("mlp.experts.down_proj_bias"),
        },
    ),
    Family(
        "Llama 4",
        ("llama4_text",),
        num_experts=_key("num_local_experts", default=16),
        top_k=_key("num_experts_per_tok", default=1),
        expert_width=_key("intermediate_size", default=8192),
        shared_expert_width=_key("intermediate_size", default=8192),
        router={"score": "sigmoid", "renormalize": False, "weights_on": "input"},
        weights={
            "router": _linear("feed_forward.router.weight"),
            "gate_up": _as_is("feed_forward.experts.gate_up_proj"),
            "down": _as_is("feed_forward.experts.down_proj"),
            **_shared("feed_forward.shared_expert"),
        },
        blocks=("feed_forward",),
    ),
    Family(
        "Granite MoE",
        ("granitemoe",),
        num_experts=_key("num_local_experts", default=8),
        top_k=_key("num_experts_per_tok", default=2),
        expert_width=_key("intermediate_size", default=11008),
        router=_SOFTMAX_RENORMALIZED,
        weights=_GRANITE_FILES,
        blocks=("block_sparse_moe",),
    ),
    Family(
        "Granite MoE with a shared expert, Granite 4",
        ("granitemoeshared", "granitemoehybrid"),
        num_experts=_key("num_local_experts", default=8),
        top_k=_key("num_experts_per_tok", default=2),
        expert_width=_key("intermediate_size", default=11008),
        shared_expert_width=_key("shared_intermediate_size"),
        router=_SOFTMAX_RENORMALIZED,
        weights=_GRANITE_FILES
        | {
            "shared_gate_up": _linear("shared_mlp.input_linear.weight"),
            "shared_down": _linear("shared_mlp.output_linear.weight"),
        },
        blocks=("block_sparse_moe", "shared_mlp"),
    ),
    Family(
        "DBRX",
        ("dbrx",),
        num_experts=_key("ffn_config.moe_num_experts", default=4),
        top_k=_key("ffn_config.moe_top_k", default=1),
        expert_width=_key("ffn_config.ffn_hidden_size", default=3584),
        width=_key("d_model", default=2048),
        router={
            "renormalize": _key(
                "ffn_config.moe_normalize_expert_weights",
                default=True,
                values={1.0: True, None: False},
            )
        },
        activation=_key("ffn_config.ffn_act_fn.name", default="silu"),
        weights={
            "router": _linear("ffn.router.layer.weight"),
            "gate_up": (Weight(("ffn.experts.mlp.w1", "ffn.experts.mlp.v1"), flat=True),),
            "down": (Weight(("ffn.experts.mlp.w2",), transposed=False, flat=True),),
        },
        layer="blocks.{layer}.",
        blocks=("ffn",),
    ),
    Family(
        "Jamba",
        ("jamba",),
        num_experts=_key("num_experts", default=16),
        top_k=_key("num_experts_per_tok", default=2),
        expert_width=_key("intermediate_size", default=14336),
        router={"renormalize": False},
        weights={"router": _linear("feed_forward.router.weight"), **_per_expert("feed_forward")},
        blocks=("feed_forward",),
    ),
    Family(
        "Hunyuan",
        ("hunyuan_v1_moe",),
        num_experts=_key("num_experts"),
        top_k=_key("moe_topk"),
        expert_width=_key("intermediate_size"),
        shared_expert_width=_key("intermediate_size"),
        router=_SOFTMAX_RENORMALIZED,
        weights={
            **_per_expert("mlp"),
            **_shared("mlp.shared_mlp"),
            "router": _linear("mlp.gate.wg.weight"),
        },
    ),
    Family(
        # transformers drops the tokens of a sequence that exceed expert_capacity at one expert.
        "Switch Transformers, without their capacity for each expert and sequence",
        ("switch_transformers",),
        num_experts=_key("num_experts", default=8),
        top_k=Key((), 1),
        expert_width=_key("d_ff", default=2048),
        width=_key("d_model", default=768),
        router={"renormalize": False, "logits_bias": _key("router_bias", default=False)},
        experts=_without_gate,
        activation=_key("dense_act_fn", default="relu"),
        weights={
            "router": _linear("mlp.router.classifier.weight"),
            "router_bias": _as_is("mlp.router.classifier.bias"),
            "up": _linear("mlp.experts.expert_{expert}.wi.weight"),
            "down": _linear("mlp.experts.expert_{expert}.wo.weight"),
        },
        # Encoder and decoder have layers of the same numbers, so they go by their names.
        layer="block.{layer}.",
        only=(Only(_key("is_gated_act", default=False), (False,), "experts with a gate"),),
    ),
    Family(
        "Nemotron-H",
        ("nemotron_h",),
        num_experts=_key("n_routed_experts", default=8),
        top_k=_key("num_experts_per_tok", default=2),
        expert_width=_key("moe_intermediate_size", default=7688),
        shared_expert_width=_key("moe_shared_expert_intermediate_size", default=7688),
        router=_router_of_deepseek_v3(routed_scaling_factor=1.0, **_WITHOUT_GROUPS),
        experts=_without_gate,
        activation=_key("mlp_hidden_act", default="relu2"),
        weights={
            "router": _linear("mixer.gate.weight"),
            "bias": _as_is("mixer.gate.e_score_correction_bias"),
            "up": (
                Weight(("mixer.experts.{expert}.up_proj.weight",)),
                Weight(("mixer.experts.up_proj",)),
            ),
            "down": (
                Weight(("mixer.experts.{expert}.down_proj.weight",)),
                Weight(("mixer.experts.down_proj",)),
            ),
            "shared_up": _linear("mixer.shared_experts.up_proj.weight"),
            "shared_down": _linear("mixer.shared_experts.down_proj.weight"),
        },
        blocks=("mixer",),
        only=(
            Only(
                _key("moe_latent_size", default=None),
                (None,),
                "experts on a projection of the router's input",
            ),
            Only(_key("mlp_bias", default=False), (False,), "a bias in the shared experts alone"),
        ),
    ),
)

#: Families that are known and cannot be expressed, by model_type: what they would need.
INEXPRESSIBLE: dict[str, str] = {
    "phimoe": "a router of its own (sparsemixer)",
    "longcat_flash": "zero experts, which return their input",
    "gemma4_text": "a router with a norm and scales of its own, on another input than the experts'",
    "deepseek_v4": "a score sqrt(softplus(x)), and layers that choose experts by token id",
    "nllb-moe": "a capacity for each expert",
}
