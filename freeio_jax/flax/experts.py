"""SwiGLU experts (arXiv:2002.05202): ``(silu(x @ gate) * (x @ up)) @ down``."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from freeio_jax.grouped_matmul import grouped_matmul


def _gated(gate_up):
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def swiglu(
    rows: jax.Array, gate_up: jax.Array, down: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    """Evaluates each group of rows with its own expert.

    Args:
      rows: ``[M, H]``, packed expert-major, as ``dispatch`` returns them.
      gate_up: ``[G, H, 2*F]``: the gate's columns first, then up's.
      down: ``[G, F, H]``.
      group_sizes: int32 ``[G]``.

    Returns:
      ``[M, H]``; rows past ``sum(group_sizes)`` are zero.
    """
    return grouped_matmul(_gated(grouped_matmul(rows, gate_up, group_sizes)), down, group_sizes)


def shared_swiglu(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
    """The expert that sees every token: x ``[T, H]``, gate_up ``[H, 2*S]``, down ``[S, H]``."""
    return jnp.dot(_gated(jnp.dot(x, gate_up)), down)
