"""Attention with groups of heads that share keys and values: Mixtral, Qwen3, OLMoE and gpt-oss.

The modules have the names of the checkpoints, so a parameter's path is the name of its tensor.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from models.rope import Rope


def attend(q, k, v, visible, scale, sinks=None):
    """Attention with groups of heads that share keys and values.

    Args:
      q: ``[B, L, N, D]``.
      k: ``[B, S, G, D]``; N/G heads share each.
      v: ``[B, S, G, V]``.
      visible: bool ``[B, L, S]``.
      scale: factor on the scores.
      sinks: ``[N]``: for each head the score of a key without a value (gpt-oss); None for none.

    Returns:
      ``[B, L, N, V]``. The softmax is float32. A query that sees nothing gets arbitrary values.
    """
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    q = q.reshape(batch, length, groups, heads // groups, width)
    wide = {"preferred_element_type": jnp.float32}
    scores = scale * jnp.einsum("blgnd,bsgd->bgnls", q, k, **wide)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(groups, heads // groups, 1, 1)
        sinks = jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sinks], axis=-1)
    weights = jax.nn.softmax(scores)[..., : k.shape[1]].astype(v.dtype)
    return jnp.einsum("bgnls,bsgv->blgnv", weights, v).reshape(batch, length, heads, v.shape[-1])


@dataclasses.dataclass(frozen=True)
class GroupedQueries:
    """Settings of :class:`Attention`.

    Attributes:
      heads: N, of the queries.
      kv_heads: of keys and values.
      head_width: D.
      rope: their positions.
      biases: whether the four projections have biases.
      norm: of queries and keys: ``"head"`` by head (Qwen3), ``"all"`` over all heads together
        (OLMoE), or None.
      clip: queries, keys and values are cut to this size (OLMoE); None: they are not.
      sinks: whether each head has a key without a value (gpt-oss).
    """

    heads: int
    kv_heads: int
    head_width: int
    rope: Rope
    biases: bool = False
    norm: str | None = None
    clip: float | None = None
    sinks: bool = False

    def build(self, width, norm_eps, dtype, rngs):
        return Attention(self, width, norm_eps, dtype, rngs)


class Attention(nnx.Module):
    """Causal attention with grouped queries. The cache keeps keys, rotated, and values."""

    def __init__(self, settings: GroupedQueries, width, norm_eps, dtype, rngs):
        self.settings = settings
        options = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        linear = functools.partial(nnx.Linear, use_bias=settings.biases, **options)
        all_queries = settings.heads * settings.head_width
        all_keys = settings.kv_heads * settings.head_width
        self.q_proj = linear(width, all_queries)
        self.k_proj = linear(width, all_keys)
        self.v_proj = linear(width, all_keys)
        self.o_proj = linear(all_queries, width)
        if settings.norm is not None:
            by_head = settings.norm == "head"
            norm = functools.partial(nnx.RMSNorm, epsilon=norm_eps, **options)
            self.q_norm = norm(settings.head_width if by_head else all_queries)
            self.k_norm = norm(settings.head_width if by_head else all_keys)
        if settings.sinks:
            self.sinks = nnx.Param(jnp.zeros(settings.heads, dtype))

    def kept(self):
        """What the cache keeps of a token: shapes by name."""
        shape = (self.settings.kv_heads, self.settings.head_width)
        return {"k": shape, "v": shape}

    def __call__(self, x, positions, visible, write):
        """``x`` ``[B, L, H]``; ``write(new)`` puts new arrays into the cache and returns all."""
        s = self.settings
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if s.norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        if s.clip is not None:
            q, k, v = (jnp.clip(a, -s.clip, s.clip) for a in (q, k, v))
        q, k, v = (a.reshape(*a.shape[:2], -1, s.head_width) for a in (q, k, v))
        if s.norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = s.rope(q, positions), s.rope(k, positions)
        kept = write({"k": k, "v": v})
        sinks = self.sinks[...] if s.sinks else None
        scale = s.rope.score_factor * s.head_width**-0.5
        y = attend(q, kept["k"], kept["v"], visible, scale, sinks)
        return self.o_proj(y.reshape(*x.shape[:2], -1))
