"""Tiny whole models: their logits by the example's decoder, and by transformers."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType
from models import tiny, weights
from models.decoder import Decoder, last_of
from models.tokens import pad

from freeio_jax import hf

#: Of unequal lengths, and longer than the windows of the tiny models.
PROMPTS = [list(b"hello there world"), list(b"a bee can"), list(b"xyzzy: nothing")]
#: Tokens that the cached evaluation takes one after the other.
STEPS = 4
#: The logits that are compared: after the cached prompts, and after the last token.
PLACES = (-1 - STEPS, -1)

#: Settings that the families' own tiny configs do not have: (family, changes).
VARIANTS = {
    "mixtral_llama3": (
        "mixtral",
        {
            "sliding_window": None,
            "tie_word_embeddings": True,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "qwen3_window": (
        "qwen3_moe",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "attention_bias": True,
            "mlp_only_layers": [],
            "decoder_sparse_step": 2,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        },
    ),
    "olmoe_groups": (
        "olmoe",
        {"num_key_value_heads": 2, "clip_qkv": None, "norm_topk_prob": True},
    ),
    "deepseek_plain": (
        "deepseek_v3",
        {
            "q_lora_rank": None,
            "rope_scaling": None,
            "rope_interleave": False,
            "attention_bias": True,
            "first_k_dense_replace": 0,
        },
    ),
    "gpt_oss_new_file": (
        "gpt_oss",
        {
            "rope_scaling": None,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "attention_factor": 1.25,
                "original_max_position_embeddings": 64,
            },
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
}


def write(folder: Path, name: str) -> Path:
    """Writes the tiny checkpoint of a family or variant."""
    family, changes = VARIANTS.get(name, (name, {}))
    tiny.write_checkpoint(folder, tiny.config_of(family, **changes))
    return folder


def mesh_of(ranks: int) -> jax.sharding.Mesh:
    devices = jax.devices()[:ranks]
    return jax.make_mesh((ranks,), ("expert",), axis_types=(AxisType.Auto,), devices=devices)


def load(folder: Path, mesh: jax.sharding.Mesh):
    return weights.load(hf.open(folder), mesh=mesh, dtype=jnp.float32)


def evaluate(folder: Path, ranks: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The logits without a cache, ``[L, V]`` of each prompt, and at :data:`PLACES` with one."""
    mesh = mesh_of(ranks)
    with jax.set_mesh(mesh):
        model = load(folder, mesh)
        return without_cache(model, PROMPTS), with_cache(model, PROMPTS)


# The programs run once: what takes time is XLA's compiler.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def without_cache(model: Decoder, prompts: list[list[int]]) -> list[np.ndarray]:
    """The logits ``[L, V]`` of each prompt, all evaluated at once, padded on the left."""
    graph, state = nnx.split(model)

    @_jit
    def evaluate(state, tokens, mask):
        model = nnx.merge(graph, state)
        return model.logits(model(tokens, mask)[0])

    tokens, mask = pad(prompts, "left")
    logits = np.asarray(evaluate(state, tokens, mask))
    return [logits[row][mask[row]] for row in range(len(prompts))]


def with_cache(model: Decoder, prompts: list[list[int]]) -> np.ndarray:
    """The logits ``[B, 2, V]`` at :data:`PLACES`, with a cache, padded on the right."""
    graph, state = nnx.split(model)
    batch = len(prompts)

    @_jit
    def prefill(state, tokens, mask):
        model = nnx.merge(graph, state)
        cache = model.empty_cache(batch, tokens.shape[1] + STEPS)
        hidden, cache = model(tokens, mask, cache)
        return model.logits(last_of(hidden, mask)), cache

    @_jit
    def step(state, tokens, cache):
        model = nnx.merge(graph, state)
        hidden, cache = model(tokens[:, None], jnp.ones((batch, 1), bool), cache)
        return model.logits(hidden[:, 0]), cache

    first, cache = prefill(state, *pad([prompt[:-STEPS] for prompt in prompts], "right"))
    for place in range(-STEPS, 0):
        last, cache = step(state, np.array([p[place] for p in prompts], np.int32), cache)
    return np.stack([first, last], axis=1)


def by_transformers(folder: Path) -> list[np.ndarray]:
    """The logits ``[L, V]`` of each prompt, evaluated on its own."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return [model.eval()(torch.tensor([prompt])).logits[0].numpy() for prompt in PROMPTS]


def at_places(logits: list[np.ndarray]) -> np.ndarray:
    """Of the logits ``[L, V]`` of each prompt those at :data:`PLACES`, ``[B, 2, V]``."""
    return np.stack([one[list(PLACES)] for one in logits])


def difference(logits: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference as a part of the largest logit."""
    return float(np.abs(logits - expected).max() / np.abs(expected).max())
