"""What code around a call of grouped_matmul may say of it."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable

import jax

#: Name of an implementation, or None. JAX compiles anew where it differs.
implementation = jax.make_user_context(None)

#: What runs in the place of grouped_matmul while a function is traced; None: grouped_matmul itself.
substitute: contextvars.ContextVar[Callable | None] = contextvars.ContextVar(
    "substitute", default=None
)


@contextlib.contextmanager
def use(name: str | None):
    """What is traced within is multiplied by this implementation, whether it is right or not.

    Args:
      name: on GPUs ``"hopper"``, ``"tokamax"``, ``"ragged_dot"`` or ``"tiled"``, on CPU ``"tiled"``
        or ``"ragged_dot"``; None: the usual choice. A name that does not serve raises a ValueError
        when the program is compiled.

    For comparisons, and to find faults.

    >>> import jax, jax.numpy as jnp
    >>> from freeio_jax.grouped_matmul import grouped_matmul, use
    >>> with use("ragged_dot"):
    ...     grouped_matmul(jnp.ones((2, 3)), jnp.ones((1, 3, 1)), jnp.array([2])).tolist()
    [[3.0], [3.0]]
    """
    with implementation(name):
        yield


@contextlib.contextmanager
def replaced(by: Callable | None):
    """Within, ``by(rows, weights, group_sizes)`` is evaluated where grouped_matmul is called.

    ``by`` may call grouped_matmul: it is itself there.
    """
    token = substitute.set(by)
    try:
        yield
    finally:
        substitute.reset(token)
