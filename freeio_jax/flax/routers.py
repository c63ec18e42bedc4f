"""Routers of model families that :class:`freeio_jax.flax.Router` has no settings for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from freeio_jax.flax.custom_router import CustomRouter
from freeio_jax.flax.router import Choice


@dataclasses.dataclass(frozen=True)
class NormalizedRouter(CustomRouter):
    """Gemma-4's: softmax of a normalized input, with a factor for each expert.

    With ``h = x / rms(x) * scale / sqrt(W)`` the scores are ``softmax(h @ kernel)``. The weights of
    a token's best experts are divided by their sum, and multiplied with the experts' factors.

    Parameters of the layer: ``router_scale`` ``[W]``, ``router_kernel`` ``[W, E]``,
    ``router_per_expert_scale`` ``[E]``; the scales start as ones.

    Attributes:
      eps: added to the mean square.
      load_balance_coef, z_loss_coef: factors of the losses in the auxiliary loss.
    """

    eps: float = 1e-6
    load_balance_coef: float = 0.0
    z_loss_coef: float = 0.0

    def parameters(self, width: int, num_experts: int) -> dict[str, tuple[int, ...]]:
        return {
            "scale": (width,),
            "kernel": (width, num_experts),
            "per_expert_scale": (num_experts,),
        }

    def initializer(self, name: str) -> Callable[..., jax.Array] | None:
        return None if name == "kernel" else jax.nn.initializers.ones

    def __call__(self, parameters, x, top_k, key=None) -> Choice:
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        scale = parameters["scale"] * jnp.float32(x.shape[-1] ** -0.5)
        h = x * lax.rsqrt(mean_square + self.eps) * scale[None]
        logits = jnp.dot(h, parameters["kernel"], precision=lax.Precision.HIGHEST)
        scores = jax.nn.softmax(logits)
        ids = lax.top_k(lax.stop_gradient(scores), top_k)[1]
        weights = jnp.take_along_axis(scores, ids, axis=-1)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return Choice(ids, weights * parameters["per_expert_scale"][ids], scores, logits)


@dataclasses.dataclass(frozen=True)
class SparseMixer(CustomRouter):
    """Phi-3.5-MoE's choice of two experts in evaluation.

    The first expert is the best one, the second the best of the others. The weight of each is its
    softmax among the experts whose logits are near its own: those for which ``(best - logit) /
    max(|logit|, best)`` is at most ``2 * jitter_eps``. The weights are not renormalized.

    In training Phi-3.5 draws the experts at random and estimates the gradient of the draw
    (SparseMixer-v2, arXiv:2409.12136). This router does not: it does the same in training as in
    evaluation.

    Parameters of the layer: ``router_kernel`` ``[W, E]``.

    Attributes:
      jitter_eps: how near the logits must be; ``router_jitter_noise`` of a configuration.
      load_balance_coef, z_loss_coef: factors of the losses in the auxiliary loss.
    """

    jitter_eps: float = 0.01
    load_balance_coef: float = 0.0
    z_loss_coef: float = 0.0

    def check(self, num_experts: int, top_k: int) -> None:
        super().check(num_experts, top_k)
        if top_k != 2:
            raise ValueError(f"SparseMixer: a token has two experts, got top_k={top_k}.")

    def parameters(self, width: int, num_experts: int) -> dict[str, tuple[int, ...]]:
        return {"kernel": (width, num_experts)}

    def __call__(self, parameters, x, top_k, key=None) -> Choice:
        logits = jnp.dot(x, parameters["kernel"], precision=lax.Precision.HIGHEST)
        experts = jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
        first, first_weight = self._best_of(logits, logits)
        others = jnp.where(experts == first[:, None], -jnp.inf, logits)
        second, second_weight = self._best_of(others, logits)
        return Choice(
            jnp.stack([first, second], axis=1),
            jnp.stack([first_weight, second_weight], axis=1),
            jax.nn.softmax(logits),
            logits,
        )

    def _best_of(self, candidates, logits):
        """The best candidate of each token, and its softmax among the candidates near it."""
        best = lax.stop_gradient(jnp.max(candidates, axis=-1, keepdims=True))
        known = lax.stop_gradient(logits)
        distance = (best - known) / jnp.maximum(jnp.abs(known), best)
        near = jnp.where(distance > 2 * self.jitter_eps, -jnp.inf, candidates)
        ids = jnp.argmax(candidates, axis=-1).astype(jnp.int32)
        weights = jnp.take_along_axis(jax.nn.softmax(near), ids[:, None], axis=-1)
        return ids, weights[:, 0]
