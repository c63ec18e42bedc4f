"""The table of model families: for each the settings of its MoE block, and its weights' names."""

from __future__ import annotations

from freeio_jax.flax.experts import MLP, SwiGLU
from freeio_jax.flax.routers import NormalizedRouter, SparseMixer
from freeio_jax.hf.family import REQUIRED, Family, Key, Only, Times, Weight


def _key(*names, default=REQUIRED, **options):
    return Key(names, default, **options)


def _linear(*names):
    return (Weight(names),)


def _as_is(*names):
    return (Weight(names, transposed=False),)


def _either_way(name):
    """All experts in one tensor: ``[E, in, out]`` as published, or as transformers has it."""
    return (Weight((name,), transposed=False), Weight((name,)))


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
_BY_NORM_TOPK_PROB = {"renormalize": _key("norm_topk_prob", default=False)}
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
_SHARED_OF_DEEPSEEK = Times((_MOE_WIDTH, _key("n_shared_experts")))
_GRANITE_FILES = {
    "router": _linear("block_sparse_moe.router.layer.weight"),
    "gate_up": _linear("block_sparse_moe.input_linear.weight"),
    "down": _linear("block_sparse_moe.output_linear.weight"),
}


def _router_of_deepseek_v3(**defaults):
    """With the defaults of config.json's keys, where all models of a family share them."""
    renormalize, scale, groups, of_token = (
        _key(name, default=defaults.get(name, REQUIRED))
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
_KIMI_SETTINGS = {
    "num_experts": _key("num_experts"),
    "top_k": _key("num_experts_per_token", "num_experts_per_tok"),
    "expert_width": _MOE_WIDTH,
    "shared_expert_width": Times((_MOE_WIDTH, _key("num_shared_experts"))),
    "router": {
        "score": "sigmoid",
        "renormalize": _key("moe_renormalize", "norm_topk_prob"),
        "weight_scale": _key("routed_scaling_factor"),
        "num_groups": _key("num_expert_group", "n_group"),
        "groups_per_token": _key("topk_group"),
        "bias_update_rate": 0.0,
    },
}
_COHERE_SCORE = _key(
    "expert_selection_fn",
    default="softmax",
    values={"softmax": "softmax", "sigmoid": "sigmoid"},
)
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
        "Qwen3-MoE, Mellum",
        ("qwen3_moe", "mellum"),
        num_experts=_key("num_experts", "num_local_experts"),
        top_k=_EXPERTS_PER_TOKEN,
        expert_width=_MOE_WIDTH,
        router={"renormalize": _key("norm_topk_prob")},
        weights=_MOE_FILES,
    ),
    Family(
        "Qwen3-VL-MoE",
        ("qwen3_vl_moe_text",),
        num_experts=_key("num_experts", "num_local_experts", default=60),
        top_k=_key("num_experts_per_tok", default=4),
        expert_width=_key("moe_intermediate_size", default=1408),
        router=_SOFTMAX_RENORMALIZED,
        weights={
            "router": _linear("mlp.gate.weight"),
            "gate_up": _either_way("mlp.experts.gate_up_proj"),
            "down": _either_way("mlp.experts.down_proj"),
        },
    ),
    Family(
        "Qwen3-Omni-MoE's thinker",
        ("qwen3_omni_moe_text",),
        num_experts=_key("num_experts", default=128),
        top_k=_key("num_experts_per_tok", default=8),
        expert_width=_key("moe_intermediate_size", default=768),
        router={"renormalize": _key("norm_topk_prob", default=True)},
        weights=_MOE_FILES,
        other_models=("talker.",),
    ),
    Family(
        "Lara-mini",
        ("lara_mini",),
        num_experts=_key("num_experts", default=128),
        top_k=_key("num_experts_per_tok", default=4),
        expert_width=_key("moe_intermediate_size", default=512),
        shared_expert_width=_key("shared_expert_intermediate_size", default=512),
        router={"renormalize": _key("norm_topk_prob", default=True)},
        weights=_MOE_FILES | _shared("mlp.shared_expert"),
    ),
    Family(
        "Flint",
        ("flint",),
        num_experts=_key("num_experts", default=256),
        top_k=_key("num_experts_per_tok", default=6),
        expert_width=_key("moe_intermediate_size", default=512),
        shared_expert_width=_key("shared_expert_intermediate_size", default=1024),
        router={"score": "sigmoid", "renormalize": _key("norm_topk_prob", default=True)},
        weights=_MOE_FILES | _shared("mlp.shared_expert"),
    ),
    Family(
        "OLMoE, FlexOlmo",
        ("olmoe", "flex_olmo"),
        num_experts=_key("num_experts", "num_local_experts"),
        top_k=_EXPERTS_PER_TOKEN,
        expert_width=_key("intermediate_size"),
        router=_BY_NORM_TOPK_PROB,
        weights=_MOE_FILES,
    ),
    Family(
        "DeepSeek-V2",
        ("deepseek_v2",),
        num_experts=_key("n_routed_experts", "num_experts", default=64),
        top_k=_EXPERTS_PER_TOKEN,
        expert_width=_MOE_WIDTH,
        shared_expert_width=Times((_MOE_WIDTH, _key("n_shared_experts", default=2))),
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
        "DeepSeek-V3, V3.1, V3.2, R1, Kimi K2, GLM-4.5 to GLM-5, GLM-4.5V, dots.llm1, Solar Open",
        (
            "deepseek_v3",
            "deepseek_v32",
            "kimi_k2",
            "glm4_moe",
            "glm4_moe_lite",
            "glm4v_moe_text",
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
        "A.X K2",
        ("axk2",),
        num_experts=_key("n_routed_experts", "num_local_experts", default=128),
        top_k=_key("num_experts_per_tok", default=8),
        expert_width=_key("moe_intermediate_size", default=512),
        shared_expert_width=Times(
            (_key("moe_intermediate_size", default=512), _key("n_shared_experts", default=1))
        ),
        router={
            "score": "sigmoid",
            "renormalize": _key("norm_topk_prob", default=True),
            "weight_scale": _key("routed_scaling_factor", default=2.5),
            "bias_update_rate": 0.0,
        },
        weights=_DEEPSEEK_FILES | {"bias": _as_is("mlp.gate.e_score_correction_bias")},
        only=(
            Only(
                _key("n_group", default=None),
                (None, 1),
                "groups in which the experts of the others have the score 0, so that they are "
                "chosen before those with a negative one",
            ),
        ),
    ),
    Family(
        "Beam",
        ("beam",),
        num_experts=_key("num_experts", default=256),
        top_k=_key("num_experts_per_tok", default=8),
        expert_width=_key("moe_intermediate_size", default=2560),
        router=_router_of_deepseek_v3(
            norm_topk_prob=True, routed_scaling_factor=2.5, n_group=8, topk_group=4
        ),
        weights=_MOE_FILES | {"bias": _as_is("mlp.gate.e_score_correction_bias")},
    ),
    Family(
        "Laguna",
        ("laguna",),
        num_experts=_key("num_experts", default=256),
        top_k=_key("num_experts_per_tok", default=8),
        expert_width=_key("moe_intermediate_size", default=512),
        shared_expert_width=_key("shared_expert_intermediate_size", default=512),
        router={
            "score": "sigmoid",
            "renormalize": True,
            "weight_scale": _key("moe_routed_scaling_factor", default=1.0),
            "bias_update_rate": 0.0,
        },
        weights=_MOE_FILES
        | _shared("mlp.shared_expert")
        | {"bias": _as_is("mlp.experts.e_score_correction_bias")},
        only=(
            Only(
                _key("moe_router_logit_softcapping", default=0.0),
                (0.0,),
                "a tanh of the router's logits",
            ),
            Only(
                _key("moe_apply_router_weight_on_input", default=False),
                (False,),
                "weights on the experts' input, which transformers does not have in this family",
            ),
        ),
    ),
    Family(
        "Step-3.5, Step-3.7",
        ("step3p5",),
        num_experts=_key("n_routed_experts", "moe_num_experts", default=288),
        top_k=_key("num_experts_per_tok", "moe_top_k", default=8),
        expert_width=_key("moe_intermediate_size", default=1280),
        shared_expert_width=_key("share_expert_dim", "share_expert_dims", default=1280),
        router={
            "score": "sigmoid",
            "renormalize": True,
            "weight_scale": _key("moe_router_scaling_factor", default=1.0),
            "bias_update_rate": 0.0,
        },
        activation=Key((), "silu"),
        weights={
            "router": _linear("moe.gate.weight"),
            "bias": _as_is("moe.router_bias"),
            "gate_up": _linear("moe.gate_proj.weight", "moe.up_proj.weight"),
            "down": _linear("moe.down_proj.weight"),
            **_shared("share_expert"),
        },
        only=(
            Only(
                _key("swiglu_limits", default=None),
                (None, 0.0),
                "experts that bound the gate after its activation",
            ),
            Only(
                _key("swiglu_limits_shared", default=None),
                (None, 0.0),
                "a shared expert that bounds the gate after its activation",
            ),
            Only(_key("mlp_bias", default=False), (False,), "a bias in the shared experts alone"),
        ),
    ),
    Family(
        "Cohere2-MoE",
        ("cohere2_moe",),
        num_experts=_key("num_experts", default=8),
        top_k=_key("num_experts_per_tok", default=2),
        expert_width=_key("intermediate_size", default=22528),
        shared_expert_width=Times(
            (
                _key("intermediate_size", default=22528),
                _key("num_shared_experts", default=0),
            )
        ),
        router={
            "score": _COHERE_SCORE,
            # A softmax over the chosen experts alone is renormalized always.
            "renormalize": _key("norm_topk_prob", default=True, only_if=(_COHERE_SCORE, "sigmoid")),
        },
        weights=_DEEPSEEK_FILES,
        only=(
            Only(
                _key("shared_expert_combination_strategy", default="average"),
                ("sum",),
                "half of what the shared expert and the others give",
                unless_zero=_key("num_shared_experts", default=0),
            ),
        ),
    ),
    Family(
        "Mistral 4",
        ("mistral4",),
        num_experts=_key("n_routed_experts", default=128),
        top_k=_key("num_experts_per_tok", default=4),
        expert_width=_key("moe_intermediate_size", default=2048),
        shared_expert_width=Times(
            (_key("moe_intermediate_size", default=2048), _key("n_shared_experts", default=1))
        ),
        router={
            "renormalize": _key("norm_topk_prob", default=True),
            "weight_scale": _key("routed_scaling_factor", default=1.0),
            "num_groups": _key("n_group", default=1),
            "groups_per_token": _key("topk_group", default=1),
        },
        weights=_DEEPSEEK_FILES,
    ),
    Family(
        "Kimi Linear",
        ("kimi_linear",),
        **_KIMI_SETTINGS,
        weights={
            "router": _linear("block_sparse_moe.gate.weight"),
            "bias": _as_is("block_sparse_moe.gate.e_score_correction_bias"),
            **_per_expert("block_sparse_moe", "w1", "w3", "w2"),
            **_shared("block_sparse_moe.shared_experts"),
        },
    ),
    Family(
        "Ling and Ring with linear attention",
        ("bailing_hybrid",),
        **_KIMI_SETTINGS,
        weights=_DEEPSEEK_FILES | {"bias": _as_is("mlp.gate.expert_bias")},
    ),
    Family(
        "AFMoE",
        ("afmoe",),
        num_experts=_key("num_experts", default=64),
        top_k=_key("num_experts_per_tok", default=6),
        expert_width=_key("moe_intermediate_size", default=1408),
        shared_expert_width=Times(
            (_key("moe_intermediate_size", default=1408), _key("num_shared_experts", default=2))
        ),
        router={
            "score": "sigmoid",
            "renormalize": True,
            "weight_scale": _key("route_scale", default=1.0),
            "bias_update_rate": 0.0,
        },
        weights=_DEEPSEEK_FILES
        | {
            "router": _linear("mlp.router.gate.weight"),
            "bias": _as_is("mlp.expert_bias"),
        },
    ),
    Family(
        "Aria",
        ("aria_text",),
        num_experts=_key("moe_num_experts", default=8),
        top_k=_key("moe_topk", default=2),
        expert_width=_key("intermediate_size", default=4096),
        shared_expert_width=Times(
            (_key("intermediate_size", default=4096), _key("moe_num_shared_experts", default=2))
        ),
        router=_SOFTMAX_RENORMALIZED,
        weights={
            "router": _linear("mlp.router.weight"),
            "gate_up": _as_is("mlp.experts.fc1.weight"),
            "down": _as_is("mlp.experts.fc2.weight"),
            **_shared("mlp.shared_experts"),
        },
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
        shared_expert_width=Times(
            (_key("moe_intermediate_size", default=1024), _key("num_shared_experts", default=1))
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
        shared_expert_width=Times(
            (_key("moe_intermediate_size", default=1536), _key("num_shared_experts", default=1))
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
        shared_expert_width=Times(
            (_key("moe_intermediate_size", default=1536), _key("moe_num_shared_experts", default=2))
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
        "Switch Transformers",
        ("switch_transformers",),
        num_experts=_key("num_experts", default=8),
        top_k=Key((), 1),
        expert_width=_key("d_ff", default=2048),
        width=_key("d_model", default=768),
        expert_capacity=_key("expert_capacity", default=64),
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
                "experts on a projection of what router and shared expert see",
            ),
            Only(_key("mlp_bias", default=False), (False,), "a bias in the shared experts alone"),
        ),
    ),
    Family(
        # In training Phi-3.5 draws experts at random, which the layer does not.
        "Phi-3.5-MoE, as in evaluation",
        ("phimoe",),
        num_experts=_key("num_local_experts", default=16),
        top_k=_key("num_experts_per_tok", default=2),
        expert_width=_key("intermediate_size", default=6400),
        router_kind=SparseMixer,
        router={"jitter_eps": _key("router_jitter_noise", default=0.01)},
        weights={
            "router_kernel": _linear("block_sparse_moe.gate.weight"),
            **_per_expert("block_sparse_moe", "w1", "w3", "w2"),
        },
    ),
    Family(
        "LongCat-Flash",
        ("longcat_flash",),
        num_experts=_key("n_routed_experts", default=512),
        top_k=_key("moe_topk", "num_experts_per_tok", default=12),
        expert_width=_key("expert_ffn_hidden_size", default=2048),
        num_zero_experts=_key("zero_expert_num", default=256),
        router={
            "renormalize": False,
            "weight_scale": _key("routed_scaling_factor", default=6.0),
            "bias_update_rate": 0.0,
        },
        weights={
            "router": _linear("mlp.router.classifier.weight"),
            "bias": _as_is("mlp.router.e_score_correction_bias"),
            **_per_expert("mlp"),
        },
        only=(
            Only(_key("router_bias", default=False), (False,), "a bias that no one uses"),
            Only(_key("zero_expert_type", default="identity"), ("identity",), "other zero experts"),
        ),
    ),
    Family(
        "Gemma 4, whose router has an input of its own",
        ("gemma4_text",),
        num_experts=_key("num_experts"),
        top_k=_key("top_k_experts"),
        expert_width=_key("moe_intermediate_size"),
        router_kind=NormalizedRouter,
        router={"eps": _key("rms_norm_eps", default=1e-6)},
        router_input=True,
        activation=_key("hidden_activation", default="gelu_pytorch_tanh"),
        weights={
            "router_kernel": _linear("router.proj.weight"),
            "router_scale": _as_is("router.scale"),
            "router_per_expert_scale": _as_is("router.per_expert_scale"),
            "gate_up": _linear("experts.gate_up_proj"),
            "down": _linear("experts.down_proj"),
        },
        blocks=("",),
    ),
)

#: Families that are known and cannot be expressed, by model_type: what they would need.
INEXPRESSIBLE: dict[str, str] = {
    "deepseek_v4": "a score sqrt(softplus(x)), and layers that choose experts by token id",
    "nllb-moe": "a capacity for each expert",
}
