"""The key-value cache: what each layer keeps of the tokens seen so far.

All sequences of a batch write to the same slot in a step. A slot is not a position: a sequence with
padding has slots without a token. So each slot knows the position of its token, and a query looks
at positions alone. It does not matter on which side the padding is.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What a model keeps of a batch of B sequences, S slots each.

    Attributes:
      layers: for each layer its arrays ``[B, S, ...]``.
      positions: int32 ``[B, S]``: the position of each slot's token; -1 for no token.
      length: int32 scalar: slots that are written.
    """

    layers: list[dict[str, jax.Array]]
    positions: jax.Array
    length: jax.Array

    @classmethod
    def empty(cls, shapes: list[dict[str, tuple]], batch: int, slots: int, dtype) -> Cache:
        """``shapes``: what each layer keeps of a token."""
        return cls(
            [{n: jnp.zeros((batch, slots, *s), dtype) for n, s in one.items()} for one in shapes],
            jnp.full((batch, slots), -1, jnp.int32),
            jnp.zeros((), jnp.int32),
        )

    def num_tokens(self) -> jax.Array:
        """Tokens of each sequence, int32 ``[B]``."""
        return jnp.sum(self.positions >= 0, axis=1, dtype=jnp.int32)

    def write(self, layer: dict[str, jax.Array], new: dict[str, jax.Array]):
        """A layer's arrays with those of L new tokens, ``[B, L, ...]``, after the others."""
        return {name: self._after_the_others(layer[name], a) for name, a in new.items()}

    def advance(self, layers: list[dict[str, jax.Array]], positions: jax.Array) -> Cache:
        """The cache after L new tokens at ``positions`` ``[B, L]``, with what the layers wrote."""
        return Cache(layers, self.seen_by(positions), self.length + positions.shape[1])

    def seen_by(self, positions: jax.Array) -> jax.Array:
        """The positions of all slots, with those of the new tokens."""
        return self._after_the_others(self.positions, positions)

    def _after_the_others(self, array, new):
        return lax.dynamic_update_slice_in_dim(array, new.astype(array.dtype), self.length, axis=1)


def positions_of(mask: jax.Array, num_before: jax.Array) -> jax.Array:
    """Positions of new tokens, int32 ``[B, L]``; -1 for padding, where ``mask`` is false.

    ``num_before``: int32 ``[B]``, tokens of each sequence before them.
    """
    return jnp.where(mask, num_before[:, None] + jnp.cumsum(mask, axis=1) - 1, -1)


def visible(queries: jax.Array, keys: jax.Array, window: int | None) -> jax.Array:
    """Which keys a query attends to, bool ``[B, L, S]``, from positions ``[B, L]`` and ``[B, S]``.

    ``window``: a query attends to this many positions, its own included; None: to all before it.
    """
    distance = queries[:, :, None] - keys[:, None]
    seen = (keys[:, None] >= 0) & (distance >= 0)
    return seen if window is None else seen & (distance < window)
