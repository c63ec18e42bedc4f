"""The decoder: embedding, layers of attention and experts, logits.

The modules have the names of the checkpoints, so a parameter's path is the name of its tensor.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from freeio_jax.flax.nnx import MoE
from models import families
from models.cache import Cache, positions_of, visible


class MLP(nnx.Module):
    """A layer's MLP where it has no experts."""

    def __init__(self, width, hidden, dtype, rngs):
        options = {"use_bias": False, "dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        linear = functools.partial(nnx.Linear, **options)
        self.gate_proj = linear(width, hidden)
        self.up_proj = linear(width, hidden)
        self.down_proj = linear(hidden, width)

    def __call__(self, x, token_mask):
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    """Attention, then experts or an MLP, each on normalized input and added to it."""

    def __init__(self, settings: families.ModelSettings, mlp, dtype, rngs):
        options = {"epsilon": settings.norm_eps, "dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        norm = functools.partial(nnx.RMSNorm, settings.width, **options)
        self.input_layernorm = norm()
        self.self_attn = settings.attention.build(settings.width, settings.norm_eps, dtype, rngs)
        self.post_attention_layernorm = norm()
        self.mlp = mlp

    def __call__(self, x, positions, visible, write):
        x = x + self.self_attn(self.input_layernorm(x), positions, visible, write)
        return x + self.mlp(self.post_attention_layernorm(x), token_mask=positions >= 0)


class Decoder(nnx.Module):
    """Tokens to the logits of the next ones.

    Args:
      config: the contents of ``config.json``.
      mesh: over whose axis "expert" the experts are spread.
      dtype: of parameters and computation. The router and the softmax are float32 always.
      moe_options: further options of the MoE layers, such as ``exchange``.
      rngs: stream ``params``.
    """

    def __init__(
        self, config: dict, *, mesh, dtype, rngs, moe_options: dict[str, Any] | None = None
    ):
        self.settings = settings = families.from_config(config)
        self.dtype = dtype
        more = moe_options or {}
        options = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.embed_tokens = nnx.Embed(settings.vocabulary, settings.width, **options)

        def mlp(is_moe):
            if not is_moe:
                return MLP(settings.width, settings.dense_width, dtype, rngs)
            return MoE.from_hf(config, mesh=mesh, deterministic=True, **options, **more)

        self.layers = nnx.List(
            [Layer(settings, mlp(is_moe), dtype, rngs) for is_moe in settings.moe_layers]
        )
        self.norm = nnx.RMSNorm(settings.width, epsilon=settings.norm_eps, **options)
        if not settings.tied:
            self.lm_head = nnx.Linear(
                settings.width, settings.vocabulary, use_bias=False, **options
            )

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """A cache for ``batch`` sequences of ``slots`` tokens, padding included."""
        kept = [layer.self_attn.kept() for layer in self.layers]
        return Cache.empty(kept, batch, slots, self.dtype)

    def __call__(
        self, tokens: jax.Array, mask: jax.Array, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Evaluates new tokens after those of the cache.

        Args:
          tokens: int32 ``[B, L]``.
          mask: bool ``[B, L]``, false for padding, on either side. Padding is dispatched to no
            expert, and no token attends to it.
          cache: of the tokens before these; None: there are none, and nothing is kept.

        Returns:
          The hidden states ``[B, L, H]``, of which :meth:`logits` makes logits, and the new cache.
        """
        num_before = jnp.zeros(len(tokens), jnp.int32) if cache is None else cache.num_tokens()
        positions = positions_of(mask, num_before)
        keys = positions if cache is None else cache.seen_by(positions)
        masks = {w: visible(positions, keys, w) for w in set(self.settings.windows)}
        x = self.embed_tokens(tokens)
        kept = []
        for i, (layer, window) in enumerate(zip(self.layers, self.settings.windows, strict=True)):

            def write(new, i=i):
                kept.append(new if cache is None else cache.write(cache.layers[i], new))
                return kept[-1]

            x = layer(x, positions, masks[window], write)
        return self.norm(x), None if cache is None else cache.advance(kept, positions)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The logits of the next tokens, float32 ``[..., V]``, from hidden states ``[..., H]``."""
        if self.settings.tied:
            return self.embed_tokens.attend(hidden).astype(jnp.float32)
        return self.lm_head(hidden).astype(jnp.float32)


def last_of(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """The hidden states ``[B, H]`` of the last tokens that are no padding."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
