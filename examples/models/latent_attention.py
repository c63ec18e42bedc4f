"""Attention with latent keys and values (DeepSeek-V2 and V3)."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from flax import nnx

from models.attention import attend
from models.rope import Rope


@dataclasses.dataclass(frozen=True)
class Latents:
    """Settings of :class:`LatentAttention`.

    Attributes:
      heads: N.
      query_rank: features of a compressed query; None: queries are not compressed.
      latent_width: C, features of the latent of keys and values.
      plain_width: features of a head's key that do not rotate.
      rope_width: features that rotate, which all heads share.
      value_width: features of a head's value.
      rope: their positions.
      biases: whether the first projections and the last have biases.
    """

    heads: int
    query_rank: int | None
    latent_width: int
    plain_width: int
    rope_width: int
    value_width: int
    rope: Rope
    biases: bool = False

    def build(self, width, norm_eps, dtype, rngs):
        return LatentAttention(self, width, dtype, rngs)


class LatentAttention(nnx.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    The cache keeps a token's latent and its rotated key, C + rope_width numbers for all heads
    together. Keys and values are never made of it: the projection from latents to keys is applied
    to the queries instead, and that to values to the result. So it is attention with one key-value
    head.
    """

    def __init__(self, settings: Latents, width, dtype, rngs):
        self.settings = s = settings
        options = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        linear = functools.partial(nnx.Linear, **options)
        norm = functools.partial(nnx.RMSNorm, epsilon=1e-6, **options)
        all_queries = s.heads * (s.plain_width + s.rope_width)
        if s.query_rank is None:
            self.q_proj = linear(width, all_queries, use_bias=False)
        else:
            self.q_a_proj = linear(width, s.query_rank, use_bias=s.biases)
            self.q_a_layernorm = norm(s.query_rank)
            self.q_b_proj = linear(s.query_rank, all_queries, use_bias=False)
        both = s.latent_width + s.rope_width
        self.kv_a_proj_with_mqa = linear(width, both, use_bias=s.biases)
        self.kv_a_layernorm = norm(s.latent_width)
        expanded = s.heads * (s.plain_width + s.value_width)
        self.kv_b_proj = linear(s.latent_width, expanded, use_bias=False)
        self.o_proj = linear(s.heads * s.value_width, width, use_bias=s.biases)

    def kept(self):
        """What the cache keeps of a token: shapes by name."""
        return {"latent": (self.settings.latent_width,), "key": (self.settings.rope_width,)}

    def __call__(self, x, positions, visible, write):
        """``x`` ``[B, L, H]``; ``write(new)`` puts new arrays into the cache and returns all."""
        s = self.settings
        if s.query_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.reshape(*x.shape[:2], s.heads, -1)
        plain, rotated = jnp.split(q, [s.plain_width], axis=-1)
        latent, key = jnp.split(self.kv_a_proj_with_mqa(x), [s.latent_width], axis=-1)
        key = s.rope(key[:, :, None], positions)[:, :, 0]
        kept = write({"latent": self.kv_a_layernorm(latent), "key": key})
        latent, key = kept["latent"], kept["key"]

        expand = self.kv_b_proj.kernel[...].reshape(s.latent_width, s.heads, -1)
        to_key, to_value = jnp.split(expand, [s.plain_width], axis=-1)
        plain = jnp.einsum("blnd,cnd->blnc", plain, to_key)
        q = jnp.concatenate([plain, s.rope(rotated, positions)], axis=-1)
        k = jnp.concatenate([latent, key], axis=-1)[:, :, None]
        scale = s.rope.score_factor * (s.plain_width + s.rope_width) ** -0.5
        y = attend(q, k, latent[:, :, None], visible, scale)
        y = jnp.einsum("blnc,cnv->blnv", y, to_value)
        return self.o_proj(y.reshape(*x.shape[:2], -1))
