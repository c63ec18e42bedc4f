"""Report: what one call of an MoE layer tells of all shards together."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """What one call of an MoE layer reports: of all shards together, equal on all of them.

    Attributes:
      load: int32 ``[E]``: assignments to each expert, before any drop. With Z zero experts it is
        ``[E + Z]``, these last.
      dropped: int32 scalar: assignments that did not fit in the capacity.
      expert_drops: int32 ``[E]``: these by the expert that they were for.
      source_drops: int32 ``[S]``: these by the rank whose tokens they were for: S ranks hold
        tokens, in the order of ``token_axes``.
      load_balance_loss: float32 scalar, without its coefficient; 1 where even.
      z_loss: float32 scalar, without its coefficient.
      aux_loss: float32 scalar to add to the training loss: both losses with their coefficients.
    """

    load: jax.Array
    dropped: jax.Array
    expert_drops: jax.Array
    source_drops: jax.Array
    load_balance_loss: jax.Array
    z_loss: jax.Array
    aux_loss: jax.Array

    @classmethod
    def zeros(cls, num_experts: int, num_sources: int, num_zero_experts: int = 0) -> Report:
        """The report of a layer before its first call.

        Args:
          num_experts: E.
          num_sources: S, ranks that hold tokens.
          num_zero_experts: Z.
        """
        loss = jnp.zeros((), jnp.float32)
        return cls(
            jnp.zeros(num_experts + num_zero_experts, jnp.int32),
            *no_drops(num_experts, num_sources),
            loss,
            loss,
            loss,
        )


def no_drops(num_experts: int, num_sources: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``dropped``, ``expert_drops`` and ``source_drops`` where nothing can be dropped."""
    shapes = ((), (num_experts,), (num_sources,))
    return tuple(jnp.zeros(shape, jnp.int32) for shape in shapes)


def count_drops(
    topk_idx: jax.Array,
    has_row: jax.Array,
    num_experts: int,
    *,
    token_axes: tuple[str, ...],
    model_axes: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``dropped``, ``expert_drops`` and ``source_drops`` of all shards, in one exchange.

    Args:
      topk_idx: int32 ``[T, K]``: the assignments of this shard. An id outside ``[0, E)`` is none.
      has_row: bool ``[T, K]``: which of them have a packed row.
      num_experts: E.
      token_axes: manual mesh axes over which the tokens are sharded.
      model_axes: manual mesh axes whose ranks have the same tokens and lose the same rows.
    """
    num_sources, me = lax.axis_size(token_axes), lax.axis_index(token_axes)
    if model_axes:  # the first of these ranks counts for all
        has_row = has_row | (lax.axis_index(model_axes) > 0)
    lost = jnp.where(has_row, -1, topk_idx)
    experts = jnp.arange(num_experts, dtype=jnp.int32)[None, None]
    by_expert = jnp.sum(lost[..., None] == experts, axis=(0, 1), dtype=jnp.int32)
    is_me = jnp.arange(num_sources, dtype=jnp.int32) == me
    by_source = jnp.where(is_me, jnp.sum(by_expert, dtype=jnp.int32), 0)
    counts = lax.psum(jnp.concatenate([by_expert, by_source]), (*token_axes, *model_axes))
    expert_drops, source_drops = counts[:num_experts], counts[num_experts:]
    return jnp.sum(expert_drops, dtype=jnp.int32), expert_drops, source_drops
