"""Element types: which of them an exchange moves, which combine can sum, and in what."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

#: dtypes whose rows combine can sum. A dispatch of other rows has no gradient.
COMBINE_DTYPES = tuple(
    jnp.dtype(d)
    for d in (
        jnp.float32,
        jnp.bfloat16,
        jnp.float16,
        jnp.float64,
        jnp.float8_e4m3fn,
        jnp.float8_e5m2,
    )
)


def combine_dtype_names() -> str:
    """``COMBINE_DTYPES`` for an error's text."""
    return ", ".join(d.name for d in COMBINE_DTYPES)


def accumulator_dtype(dtype) -> np.dtype:
    """The dtype in which combine sums rows of ``dtype``: float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def has_whole_bytes(dtype) -> bool:
    """Whether an element is a whole number of bytes, as in all rows that dispatch moves."""
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return False
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits % 8 == 0
    return not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits % 8 == 0
