"""Which mesh axes of the surrounding ``shard_map`` a value varies over (its ``check_vma`` type)."""

from __future__ import annotations

from collections.abc import Iterable

import jax
from jax import lax
from jax._src import config


def checks_varying_axes() -> bool:
    """Whether this is traced inside a ``shard_map`` whose ``check_vma`` is on."""
    return config._check_vma.value


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """The axes over which any of ``arrays`` varies; none where ``check_vma`` is off."""
    return frozenset().union(*(jax.typeof(a).mat.varying for a in arrays))


def vary(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """``x``, also varying over ``axes``: its gradient is summed over those that are new.

    Where ``check_vma`` is off, types do not say what varies, and ``x`` is returned as it is.
    """
    if not checks_varying_axes():
        return x
    missing = frozenset(axes) - varying_axes(x)
    return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x
