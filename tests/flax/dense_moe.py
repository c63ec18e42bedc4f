"""The MoE layer on one device: every expert sees every token, nothing is exchanged."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from freeio_jax.flax import MoEConfig, Report
from freeio_jax.flax.report import no_drops


def choose(scores, top_k, router, bias=None):
    """Which experts each token takes, by sorting: bool ``[T, E]``."""
    choice = np.array(scores, np.float32) + (0 if bias is None else np.array(bias))
    if router.num_groups > 1:
        grouped = np.sort(choice.reshape(len(choice), router.num_groups, -1), axis=-1)
        num_best = 1 if router.group_score == "max" else 2
        worst = np.argsort(-grouped[..., -num_best:].sum(-1), axis=-1, kind="stable")
        for token, groups in enumerate(worst[:, router.groups_per_token :]):
            choice[token].reshape(router.num_groups, -1)[groups] = -np.inf
    chosen = np.zeros(choice.shape, bool)
    best = np.argsort(-choice, axis=-1, kind="stable")[:, :top_k]
    np.put_along_axis(chosen, best, True, axis=-1)
    return chosen


def score(parameters, x, router):
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    logits = jnp.dot(x, parameters["router"], precision="highest")
    exponents = jnp.exp(logits)
    if router.score == "softmax":
        return exponents / jnp.sum(exponents, axis=-1, keepdims=True), logits
    return exponents / (1 + exponents), logits


def dense_moe(parameters, x, config: MoEConfig, chosen):
    """As :func:`freeio_jax.flax.moe`, dropless, for the assignments ``chosen`` ``[T, E]``."""
    router = config.router
    scores, logits = score(parameters, x, router)
    weights = jnp.where(chosen, scores, 0.0)
    if router.renormalizes(config.top_k):
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    tokens = x.reshape(-1, x.shape[-1])

    def expert(gate_up, down):
        gate, up = jnp.split(tokens @ gate_up, 2, axis=-1)
        return (gate * jax.nn.sigmoid(gate) * up) @ down

    outputs = jax.vmap(expert)(parameters["gate_up"], parameters["down"])
    y = jnp.einsum("te,eth->th", weights * router.weight_scale, outputs)
    if config.shared_expert_width is not None:
        y = y + expert(parameters["shared_gate_up"], parameters["shared_down"])

    load = jnp.sum(chosen, axis=0, dtype=jnp.int32)
    share = scores / jnp.sum(scores, axis=-1, keepdims=True)
    balance = config.num_experts * jnp.sum(load / jnp.sum(load) * jnp.mean(share, axis=0))
    z = jnp.mean(jnp.log(jnp.sum(jnp.exp(logits), axis=-1)) ** 2)
    aux = router.load_balance_coef * balance + router.z_loss_coef * z
    drops = no_drops(config.num_experts, num_sources=1)
    return y.reshape(x.shape), Report(load, *drops, balance, z, aux)


def on_any_mesh(tree):
    """The tree with reports that do not depend on how many ranks hold the tokens."""

    def summed(node):
        if not isinstance(node, Report):
            return node
        return dataclasses.replace(
            node, source_drops=np.sum(np.asarray(node.source_drops), dtype=np.int32)
        )

    return jax.tree.map(summed, tree, is_leaf=lambda node: isinstance(node, Report))


def squashed(y):
    """A loss whose gradients are as exact as ``y``: a sine of large values would magnify their
    rounding."""
    return jnp.mean(jnp.tanh(y))


def assert_close(got, expected):
    """To a rounding of each array's largest value: other ranks add up in another order."""

    def close(g, e):
        g, e = np.asarray(g), np.asarray(e)
        np.testing.assert_allclose(g, e, rtol=0, atol=2e-5 * max(np.abs(e).max(initial=0), 1e-30))

    jax.tree.map(close, *map(on_any_mesh, (got, expected)))
