"""MoE blocks of model families, written as their models write them: one expert at a time, on one
device, without an exchange."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from freeio_jax.flax import CustomRouter, Router
from freeio_jax.flax.experts import MLP, Experts, SwiGLU, bias_of_rows, squared_relu
from freeio_jax.flax.routers import NormalizedRouter, SparseMixer
from freeio_jax.grouped_matmul import grouped_matmul

WIDTH, NUM_EXPERTS = 12, 8
NO_LOSSES = {"load_balance_coef": 0.0, "z_loss_coef": 0.0}


def dot(a, b):
    return jnp.dot(a, b, precision="highest")


def best(values, top_k):
    """The largest values and their places, best first, by sorting: two of ``[T, K]``."""
    ids = jnp.argsort(-jax.lax.stop_gradient(values), axis=-1, stable=True)[:, :top_k]
    return jnp.take_along_axis(values, ids, axis=-1), ids


def mix(ids, weights, expert):
    """The weighted sum of each token's experts; ``expert(e)`` gives ``[T, H]``."""
    return sum(
        jnp.sum(jnp.where(ids == e, weights, 0.0), axis=-1)[:, None] * expert(e)
        for e in range(NUM_EXPERTS)
    )


def swiglu(x, gate_up, down):
    gate, up = jnp.split(dot(x, gate_up), 2, axis=-1)
    return dot(gate * jax.nn.sigmoid(gate) * up, down)


def softmax_router(p, x, top_k):
    weights, ids = best(jax.nn.softmax(dot(x, p["router"])), top_k)
    return ids, weights / weights.sum(-1, keepdims=True)


def gpt_oss(p, x):
    logits, ids = best(dot(x, p["router"]) + p["router_bias"], 2)
    weights = jax.nn.softmax(logits)

    def expert(e):
        gate_up = dot(x, p["gate_up"][e]) + p["gate_up_bias"][e]
        gate, up = gate_up[:, ::2], gate_up[:, 1::2]
        gate, up = jnp.minimum(gate, 0.7), jnp.minimum(jnp.maximum(up, -0.7), 0.7)
        out = (up + 1) * (gate * jax.nn.sigmoid(gate * 1.702))
        return dot(out, p["down"][e]) + p["down_bias"][e]

    return mix(ids, weights, expert)


def switch(p, x):
    weights, ids = best(jax.nn.softmax(dot(x, p["router"])), 1)
    return mix(ids, weights, lambda e: dot(jnp.maximum(dot(x, p["up"][e]), 0), p["down"][e]))


def mlp_with_biases(p, x):
    ids, weights = softmax_router(p, x, 2)

    def mlp(x, up, up_bias, down, down_bias):
        return dot(jnp.square(jnp.maximum(dot(x, up) + up_bias, 0)), down) + down_bias

    names = ("up", "up_bias", "down", "down_bias")
    y = mix(ids, weights, lambda e: mlp(x, *(p[name][e] for name in names)))
    return y + mlp(x, *(p[f"shared_{name}"] for name in names))


def longcat(p, x):
    """Experts 8 to 10 return their input."""
    scores = jax.nn.softmax(dot(x, p["router"]))
    _, ids = best(scores + p["bias"], 4)
    weights = 1.5 * jnp.take_along_axis(scores, ids, axis=-1)
    identity = jnp.sum(jnp.where(ids >= NUM_EXPERTS, weights, 0.0), axis=-1)[:, None] * x
    return mix(ids, weights, swiglu_experts(p, x)) + identity


def longcat_on_input(p, x):
    """With an expert that every token takes, and weights on the experts' input."""
    logits, ids = best(dot(x, p["router"]), 3)
    weights = jax.nn.sigmoid(logits)
    y = jnp.sum(jnp.where(ids >= NUM_EXPERTS, weights, 0.0), axis=-1)[:, None] * x
    for k in range(3):
        experts = swiglu_experts(p, weights[:, k : k + 1] * x)
        y += mix(ids[:, k : k + 1], jnp.ones_like(weights[:, :1]), experts)
    return y + swiglu(x, p["shared_gate_up"], p["shared_down"])


def sparsemixer(scores, jitter_eps):
    """As transformers' ``sparsemixer`` in evaluation, one expert after the other."""
    chosen = []
    left = scores
    for _ in range(2):
        top = jnp.max(left, axis=-1, keepdims=True)
        factor = jnp.maximum(jnp.abs(scores), top)
        far = jax.lax.stop_gradient((top - scores) / factor) > 2 * jitter_eps
        gates = jax.nn.softmax(jnp.where(far, -jnp.inf, left))
        ids = jnp.argmax(left, axis=-1, keepdims=True)
        chosen.append((ids, jnp.take_along_axis(gates, ids, axis=-1)))
        left = jnp.where(jnp.arange(scores.shape[1]) == ids, -jnp.inf, left)
    return (jnp.concatenate(parts, axis=-1) for parts in zip(*chosen, strict=True))


def phimoe(p, x):
    ids, weights = sparsemixer(dot(x, p["router_kernel"]), 0.2)
    return mix(ids, weights, swiglu_experts(p, x))


def wider(x):
    """Another input for the router, of another width."""
    return jnp.concatenate([x, jnp.sin(x)], axis=-1)


def gemma4(p, x):
    h = wider(x)
    h = h / jnp.sqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6)
    scores = jax.nn.softmax(dot(h * p["router_scale"] / jnp.sqrt(2 * WIDTH), p["router_kernel"]))
    weights, ids = best(scores, 2)
    weights = weights / weights.sum(-1, keepdims=True) * p["router_per_expert_scale"][ids]
    return mix(ids, weights, swiglu_experts(p, x))


def nemotron_h(p, x):
    """Experts on a projection (here x), the router on what is projected."""
    scores = jax.nn.sigmoid(dot(wider(x), p["router"]))
    weights, ids = best(scores, 2)
    weights = weights / weights.sum(-1, keepdims=True)
    up, down = p["up"], p["down"]
    return mix(ids, weights, lambda e: dot(jnp.square(jax.nn.relu(dot(x, up[e]))), down[e]))


@dataclasses.dataclass(frozen=True)
class Hashed(CustomRouter):
    """A layer whose experts are those of a table by the token's id (DeepSeek-V4's first layers)."""

    vocabulary: int = 5

    def table(self, num_experts):
        return (jnp.arange(self.vocabulary)[:, None] * 3 + jnp.arange(2)[None]) % num_experts

    def parameters(self, width, num_experts):
        return {"kernel": (width, num_experts)}

    def __call__(self, parameters, x, top_k, key=None):
        x, token_ids = x
        kernel = parameters["kernel"]
        ids = self.table(kernel.shape[1])[token_ids]
        scores = jnp.sqrt(jax.nn.softplus(dot(x, kernel)))
        return ids, jnp.take_along_axis(scores, ids, axis=-1)


def with_token_ids(x):
    count = x.size // WIDTH
    return x, jnp.asarray(np.arange(count) % 5, jnp.int32).reshape(x.shape[:-1])


def hashed(p, x):
    ids = Hashed().table(NUM_EXPERTS)[with_token_ids(x)[1]]
    weights = jnp.take_along_axis(jnp.sqrt(jax.nn.softplus(dot(x, p["router_kernel"]))), ids, -1)
    return mix(ids, weights, swiglu_experts(p, x))


def six_experts(p, x):
    """Of eight in the parameters."""
    ids, weights = softmax_router(p, x, 2)
    return mix(ids, weights, swiglu_experts(p, x))


def six_experts_and_a_zero_expert(p, x):
    ids, weights = softmax_router(p, x, 2)
    identity = jnp.sum(jnp.where(ids == 6, weights, 0.0), axis=-1)[:, None] * x
    return identity + mix(jnp.where(ids < 6, ids, -1), weights, swiglu_experts(p, x))


def swiglu_experts(p, x):
    return lambda e: swiglu(x, p["gate_up"][e], p["down"][e])


def within_groups(choice, group_score, groups_per_token):
    """``choice`` ``[T, E]`` with zeros outside the best groups, whose scores are ``[T, G]``."""
    _, groups = best(group_score, groups_per_token)
    of_expert = jnp.arange(NUM_EXPERTS) // (NUM_EXPERTS // group_score.shape[1])
    return jnp.where((of_expert[:, None] == groups[:, None]).any(-1), choice, 0.0)


def qwen2_moe(p, x):
    weights, ids = best(jax.nn.softmax(dot(x, p["router"])), 2)
    shared = swiglu(x, p["shared_gate_up"], p["shared_down"])
    y = mix(ids, weights, swiglu_experts(p, x))
    return y + jax.nn.sigmoid(dot(x, p["shared_expert_gate"])) * shared


def deepseek_v2(p, x):
    scores = jax.nn.softmax(dot(x, p["router"]))
    weights, ids = best(within_groups(scores, scores.reshape(-1, 4, 2).max(-1), 2), 2)
    return mix(ids, weights * 2.5, swiglu_experts(p, x))


def deepseek_v3(p, x):
    scores = jax.nn.sigmoid(dot(x, p["router"]))
    choice = scores + p["bias"]
    group_score = jnp.sort(choice.reshape(-1, 2, 4), axis=-1)[..., -2:].sum(-1)
    # Choices are moved up, so that none of the best group is below the zeros of the others.
    _, ids = best(within_groups(choice + 10, group_score, 1), 2)
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    y = mix(ids, weights / weights.sum(-1, keepdims=True) * 2.5, swiglu_experts(p, x))
    return y + swiglu(x, p["shared_gate_up"], p["shared_down"])


def llama4(p, x, top_k=1, shared=True):
    logits, ids = best(dot(x, p["router"]), top_k)
    weights, y = jax.nn.sigmoid(logits), 0
    for k in range(top_k):
        scaled = weights[:, k : k + 1] * x
        y += mix(ids[:, k : k + 1], jnp.ones_like(weights[:, :1]), swiglu_experts(p, scaled))
    return y + swiglu(x, p["shared_gate_up"], p["shared_down"]) if shared else y


@dataclasses.dataclass(frozen=True)
class Scaled(Experts):
    """A linear map with a scale for each feature: experts of a user's own."""

    def parameters(self, width, expert_width):
        return {"kernel": (width, width), "log_scale": (width,)}

    def __call__(self, parameters, rows, group_sizes):
        scale = bias_of_rows(parameters["log_scale"], group_sizes, rows.shape[0])
        return jnp.exp(scale) * grouped_matmul(rows, parameters["kernel"], group_sizes)


def scaled(p, x):
    ids, weights = softmax_router(p, x, 2)
    y = mix(ids, weights, lambda e: jnp.exp(p["log_scale"][e]) * dot(x, p["kernel"][e]))
    return y + jnp.exp(p["shared_log_scale"]) * dot(x, p["shared_kernel"])


@dataclasses.dataclass(frozen=True)
class Family:
    """A block in two forms.

    Attributes:
      block: (parameters, x) -> y, both of ``[T, H]``.
      options: the layer's settings.
      router: the router's settings.
      has_bias: whether the router has a bias on the choice; it is ``parameters["bias"]``.
      router_input: what the layer's router sees, as a function of x; None: x.
    """

    block: Callable
    options: dict
    router: dict | CustomRouter = dataclasses.field(default_factory=dict)
    has_bias: bool = False
    router_input: Callable | None = None

    def settings(self):
        of_ours = isinstance(self.router, dict)
        router = Router(**NO_LOSSES, **self.router) if of_ours else self.router
        common = {"num_experts": NUM_EXPERTS, "top_k": 2, "expert_width": 16, "router": router}
        return common | self.options


FAMILIES = {
    "gpt_oss": Family(
        gpt_oss,
        {"experts": SwiGLU(limit=0.7, alpha=1.702, biases=True, interleaved=True)},
        {"logits_bias": True},
    ),
    "qwen2_moe": Family(
        qwen2_moe,
        {"shared_expert_width": 4, "shared_expert_gate": True},
        {"renormalize": False},
    ),
    "deepseek_v2": Family(
        deepseek_v2,
        {},
        {
            "num_groups": 4,
            "groups_per_token": 2,
            "group_score": "max",
            "renormalize": False,
            "weight_scale": 2.5,
        },
    ),
    "deepseek_v3": Family(
        deepseek_v3,
        {"shared_expert_width": 4},
        {"score": "sigmoid", "num_groups": 2, "bias_update_rate": 0.0, "weight_scale": 2.5},
        has_bias=True,
    ),
    "llama4": Family(
        llama4,
        {"top_k": 1, "shared_expert_width": 4},
        {"score": "sigmoid", "weights_on": "input"},
    ),
    "weights_on_input_of_two": Family(
        lambda p, x: llama4(p, x, 2, shared=False),
        {"capacity_factor": 8.0, "alignment": 4},
        {"score": "sigmoid", "weights_on": "input", "renormalize": False},
    ),
    "switch": Family(switch, {"top_k": 1, "experts": MLP()}),
    "mlp_with_biases": Family(
        mlp_with_biases, {"experts": MLP(squared_relu, biases=True), "shared_expert_width": 4}
    ),
    "longcat": Family(
        longcat,
        {"top_k": 4, "num_zero_experts": 3},
        {"renormalize": False, "weight_scale": 1.5, "bias_update_rate": 0.0},
        has_bias=True,
    ),
    "longcat_on_input": Family(
        longcat_on_input,
        {"top_k": 3, "num_zero_experts": 2, "shared_expert_width": 4, "capacity_factor": 8.0},
        {"renormalize": False, "score": "sigmoid", "weights_on": "input"},
    ),
    "phimoe": Family(phimoe, {}, SparseMixer(jitter_eps=0.2)),
    "gemma4": Family(gemma4, {"router_width": 2 * WIDTH}, NormalizedRouter(), router_input=wider),
    "nemotron_h": Family(
        nemotron_h,
        {"router_width": 2 * WIDTH, "experts": MLP(squared_relu)},
        {"score": "sigmoid"},
        router_input=wider,
    ),
    "hashed": Family(hashed, {}, Hashed(), router_input=with_token_ids),
    "six_experts": Family(six_experts, {"num_experts": 6, "pad_experts_to": 8}),
    "six_experts_and_a_zero_expert": Family(
        six_experts_and_a_zero_expert,
        {"num_experts": 6, "pad_experts_to": 8, "num_zero_experts": 1, "capacity_factor": 8.0},
    ),
    "own_experts": Family(scaled, {"experts": Scaled(), "shared_expert_width": 4}),
}
