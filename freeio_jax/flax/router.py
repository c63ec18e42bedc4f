"""The router: scores, top-k, losses and balancing. Pure functions, all math in float32."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Router:
    """How tokens choose their experts.

    Attributes:
      score: ``"softmax"`` over all experts, or ``"sigmoid"`` of each (DeepSeek-V3,
        arXiv:2412.19437, section 2.1.2).
      renormalize: whether the weights of a token's experts are divided by their sum. None: only
        where a token has two or more. The weight of a single expert would always be 1, and the
        router could learn nothing from the output. Switch Transformer (arXiv:2101.03961, equation
        2) also weights its single expert with the score. True and False hold for any number of
        experts, for models that were trained so.
      weight_scale: factor on the weights, after renormalization.
      num_groups: the experts form this many groups of neighbours; 1 means no groups.
      groups_per_token: a token's experts come from this many groups, those with the largest
        ``group_score`` (DeepSeek-V3, section 2.1.2, "node-limited routing").
      bias_update_rate: None for no bias. Else each expert has a bias that is added to its score
        when experts are chosen, not to its weight. Each step moves it by this much towards an even
        load (:func:`update_bias`). It takes no gradient. 0.0: the bias is loaded and never written,
        for models that come with one (DeepSeek-V3, GLM-4-MoE, MiniMax-M2, Ernie-4.5).
      jitter: in training the router's input is multiplied with uniform noise from
        ``[1 - jitter, 1 + jitter]`` (Switch Transformer, arXiv:2101.03961, section 2.2). Hugging
        Face's Mixtral and Phi-3.5 multiply the experts' input with it, too. Here it does not reach
        the experts.
      load_balance_coef: factor of the load-balance loss in the auxiliary loss. Hugging Face's loss
        is ``top_k`` times this one, and its models add one mean over all their layers.
      z_loss_coef: factor of the z-loss in the auxiliary loss. Most of Hugging Face's models have no
        such loss: 0.0.
      logits_bias: whether the logits are ``x @ kernel + bias`` (gpt-oss). This bias is a parameter:
        it is part of the scores, the weights and the losses, and takes a gradient.
      group_score: ``"top2"``: a group's score is the sum of its two best (DeepSeek-V3); ``"max"``:
        its best (DeepSeek-V2, arXiv:2405.04434, section 2.2.2).
      weights_on: ``"output"``: a token's output is ``sum_k w_k * expert_k(x)``; ``"input"``:
        ``sum_k expert_k(w_k * x)`` (Llama-4). With two or more experts for each token ``"input"``
        sends a row for each of them, for they are different rows.
    """

    score: str = "softmax"
    renormalize: bool | None = None
    weight_scale: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    bias_update_rate: float | None = None
    jitter: float = 0.0
    load_balance_coef: float = 1e-2
    z_loss_coef: float = 1e-3
    logits_bias: bool = False
    group_score: str = "top2"
    weights_on: str = "output"

    @property
    def needs_key(self) -> bool:
        """Whether the router takes a PRNG key in training."""
        return bool(self.jitter)

    def parameters(self, width: int, num_choices: int) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter, for an input of ``width`` features and this many experts."""
        shapes = {"router": (width, num_choices)}
        return shapes | {"router_bias": (num_choices,)} if self.logits_bias else shapes

    def renormalizes(self, top_k: int) -> bool:
        """Whether the weights of ``top_k`` experts are divided by their sum."""
        return top_k > 1 if self.renormalize is None else self.renormalize

    def check(self, num_experts: int, top_k: int) -> None:
        """Raises ValueError where the settings do not fit together, with the fix."""
        if self.score not in ("softmax", "sigmoid"):
            raise ValueError(f"router: score must be 'softmax' or 'sigmoid', got {self.score!r}.")
        if self.group_score not in ("top2", "max"):
            raise ValueError(
                f"router: group_score must be 'top2' or 'max', got {self.group_score!r}."
            )
        if self.weights_on not in ("output", "input"):
            raise ValueError(
                f"router: weights_on must be 'output' or 'input', got {self.weights_on!r}."
            )
        check_top_k(top_k, num_experts)
        if self.num_groups < 1 or num_experts % self.num_groups:
            raise ValueError(
                f"router: num_groups={self.num_groups} must divide num_experts={num_experts}."
            )
        if not 1 <= self.groups_per_token <= self.num_groups:
            raise ValueError(
                f"router: groups_per_token={self.groups_per_token} must be between 1 and "
                f"num_groups={self.num_groups}."
            )
        reachable = self.groups_per_token * (num_experts // self.num_groups)
        if top_k > reachable:
            raise ValueError(
                f"router: top_k={top_k} exceeds the {reachable} experts of "
                f"groups_per_token={self.groups_per_token} groups. Use more groups per token."
            )
        if not 0 <= self.jitter < 1:
            raise ValueError(f"router: jitter must be in [0, 1), got {self.jitter}.")


def check_top_k(top_k: int, num_experts: int) -> None:
    """Raises ValueError where a token cannot have ``top_k`` of ``num_experts`` experts."""
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"router: top_k={top_k} must be between 1 and num_experts={num_experts}.")


#: Softmax over all experts, the weights of two or more renormalized, the usual coefficients.
DEFAULT_ROUTER = Router()


class Choice(NamedTuple):
    """What a router chose for the tokens ``[T]`` of one shard, and what its losses need.

    Attributes:
      topk_idx: int32 ``[T, K]``: the experts.
      topk_weights: float32 ``[T, K]``.
      shares: float32 ``[T, E]``: how much each token leans to each expert, 1 in sum, for the
        load-balance loss: softmax scores, say. None: there is no such loss.
      logits: float32 ``[T, E]`` for the z-loss; None: there is no such loss.
    """

    topk_idx: jax.Array
    topk_weights: jax.Array
    shares: jax.Array | None = None
    logits: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """What a router decided for the tokens ``[T]`` of one shard.

    Attributes:
      topk_idx: int32 ``[T, K]``: the experts, best first; -1 for tokens that are masked out.
      topk_weights: float32 ``[T, K]``.
      load: int32 ``[E]``: assignments to each expert, of all shards.
      load_balance_loss: float32 scalar, of all shards; 1 where load and scores are even.
      z_loss: float32 scalar, of all shards.
    """

    topk_idx: jax.Array
    topk_weights: jax.Array
    load: jax.Array
    load_balance_loss: jax.Array
    z_loss: jax.Array


def scores(logits: jax.Array, router: Router) -> jax.Array:
    """Affinity of each token to each expert: float32 ``[T, E]`` in [0, 1]."""
    logits = logits.astype(jnp.float32)
    return jax.nn.softmax(logits) if router.score == "softmax" else jax.nn.sigmoid(logits)


def select(
    scores: jax.Array, top_k: int, router: Router, bias: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The experts of each token and their weights.

    Args:
      scores: float32 ``[T, E]``.
      top_k: K.
      router: the settings.
      bias: float32 ``[E]``, added to the scores for the choice alone.

    Returns:
      topk_idx int32 ``[T, K]``, best first, a tie to the lower id; topk_weights float32 ``[T, K]``.

    >>> import jax.numpy as jnp
    >>> from freeio_jax.flax.router import Router, select
    >>> idx, weights = select(jnp.array([[0.5, 0.125, 0.25, 0.125]]), 2, Router(renormalize=False))
    >>> idx.tolist(), weights.tolist()
    ([[0, 2]], [[0.5, 0.25]])
    >>> bias = jnp.array([0.0, 0.0, 0.0, 1.0])
    >>> idx, weights = select(jnp.array([[0.5, 0.125, 0.25, 0.125]]), 2, Router(), bias)
    >>> idx.tolist(), weights.tolist()
    ([[3, 0]], [[0.20000000298023224, 0.800000011920929]])
    """
    choice = lax.stop_gradient(scores if bias is None else scores + bias[None])
    if router.num_groups > 1:
        choice = _within_best_groups(choice, router)
    topk_idx = lax.top_k(choice, top_k)[1].astype(jnp.int32)
    weights = jnp.take_along_axis(scores, topk_idx, axis=-1)
    if router.renormalizes(top_k):
        # Sigmoid scores can all underflow to zero; then the weights are zero, not NaN.
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    return topk_idx, weights * router.weight_scale


def _within_best_groups(choice, router):
    """``choice`` with -inf outside each token's best groups."""
    num_tokens, num_experts = choice.shape
    group_size = num_experts // router.num_groups
    grouped = choice.reshape(num_tokens, router.num_groups, group_size)
    num_best = 1 if router.group_score == "max" else min(2, group_size)
    group_score = jnp.sum(lax.top_k(grouped, num_best)[0], axis=-1)
    best = lax.top_k(group_score, router.groups_per_token)[1]
    allowed = jnp.any(best[..., None] == jnp.arange(router.num_groups)[None, None], axis=1)
    return jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(num_tokens, num_experts)


def load_balance_loss(mean_scores: jax.Array, load: jax.Array) -> jax.Array:
    """``E * sum_e f_e * P_e``: 1 where even, E where all goes to one expert.

    ``f_e`` is the share of assignments that expert e gets (no gradient), ``P_e`` its mean share of
    the tokens' scores (Switch Transformer, arXiv:2101.03961, equations 4 to 6, there for top-1).

    Args:
      mean_scores: float32 ``[E]``: P, which sums to 1.
      load: int32 ``[E]``: assignments to each expert.
    """
    load = load.astype(jnp.float32)
    share = load / jnp.maximum(jnp.sum(load), 1)
    return load.shape[0] * jnp.sum(lax.stop_gradient(share) * mean_scores)


def update_bias(bias: jax.Array, load: jax.Array, rate: float) -> jax.Array:
    """One step of loss-free balancing: experts above the mean load lose ``rate``, others gain it.

    Source: arXiv:2408.15664, algorithm 1.

    Args:
      bias: float32 ``[E]``.
      load: int32 ``[E]``: assignments to each expert in the last step.
      rate: the step; the paper uses 0.001.
    """
    load = load.astype(jnp.float32)
    return bias + rate * jnp.sign(jnp.mean(load) - load)


def route(
    x: jax.Array,
    kernel: jax.Array,
    *,
    top_k: int,
    router: Router,
    logits_bias: jax.Array | None = None,
    bias: jax.Array | None = None,
    token_mask: jax.Array | None = None,
    token_axes: tuple[str, ...] = (),
    jitter_key: jax.Array | None = None,
) -> Routing:
    """Routes the tokens of one shard; load and losses are those of all shards together.

    Args:
      x: ``[T, H]``, floating.
      kernel: ``[H, E]``: logits are ``x @ kernel``, in float32.
      top_k: K.
      router: the settings.
      logits_bias: ``[E]``, added to the logits; None for none.
      bias: float32 ``[E]``, added to the scores for the choice alone; None for none.
      token_mask: bool ``[T]``: false for padding, which is routed nowhere, not counted and not
        looked at; None: all true.
      token_axes: manual mesh axes over which the tokens are sharded.
      jitter_key: PRNG key of this shard, for ``router.jitter``; None for none (evaluation).
    """
    x = x.astype(jnp.float32)
    if token_mask is not None:
        x = jnp.where(token_mask[:, None], x, 0)
    if jitter_key is not None and router.jitter:
        low, high = 1 - router.jitter, 1 + router.jitter
        x = x * jax.random.uniform(jitter_key, x.shape, jnp.float32, low, high)
    logits = jnp.dot(x, kernel.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    if logits_bias is not None:
        logits = logits + logits_bias.astype(jnp.float32)[None]
    token_scores = scores(logits, router)
    shares = token_scores
    if router.score == "sigmoid":
        shares = shares / jnp.maximum(
            jnp.sum(shares, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny
        )
    choice = Choice(*select(token_scores, top_k, router, bias), shares, logits)
    return routing_of(choice, kernel.shape[1], token_mask, token_axes)


def routing_of(
    choice: Choice,
    num_experts: int,
    token_mask: jax.Array | None = None,
    token_axes: tuple[str, ...] = (),
) -> Routing:
    """The routing of a choice: without masked tokens, with load and losses of all shards.

    Args:
      choice: of this shard's tokens.
      num_experts: E, experts among which the router chose.
      token_mask, token_axes: as in :func:`route`.
    """
    topk_idx = choice.topk_idx
    if token_mask is not None:
        topk_idx = jnp.where(token_mask[:, None], topk_idx, -1)

    def total(per_token):
        if token_mask is not None:
            per_token = jnp.where(token_mask[:, None], per_token, 0)
        local = jnp.sum(per_token, axis=0, dtype=per_token.dtype)
        return lax.psum(local, token_axes) if token_axes else local

    experts = jnp.arange(num_experts, dtype=jnp.int32)[None, None]
    load = total(jnp.sum(topk_idx[..., None] == experts, axis=1, dtype=jnp.int32))
    # The losses' sums over tokens, in one exchange: shares of the scores, z, and the token count.
    terms, zero = {}, jnp.zeros((), jnp.float32)
    if choice.shares is not None:
        terms["shares"] = choice.shares
    if choice.logits is not None:
        terms["z"] = jax.nn.logsumexp(choice.logits, axis=-1, keepdims=True) ** 2
    if terms:
        ones = jnp.ones((topk_idx.shape[0], 1), jnp.float32)
        sums = total(jnp.concatenate([*terms.values(), ones], axis=-1))
        mean = sums / jnp.maximum(sums[-1], 1)
    return Routing(
        topk_idx=topk_idx,
        topk_weights=choice.topk_weights,
        load=load,
        load_balance_loss=load_balance_loss(mean[:num_experts], load)
        if "shares" in terms
        else zero,
        # ST-MoE, arXiv:2202.08906, equation 5: keeps the logits small.
        z_loss=mean[-2] if "z" in terms else zero,
    )
