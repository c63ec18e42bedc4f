"""How the next token is chosen from the logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def choose(key: jax.Array, logits: jax.Array, temperature: float, top_p: float) -> jax.Array:
    """The next tokens, int32 ``[B]``.

    Args:
      key: PRNG key.
      logits: float32 ``[B, V]``.
      temperature: 0 for the most likely token. Else the logits are divided by it, and the token is
        drawn.
      top_p: it is drawn from the fewest most likely tokens whose probabilities sum up to this
        (arXiv:1904.09751, section 3.1).
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = within_top_p(logits / temperature, top_p)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def within_top_p(logits: jax.Array, top_p: float) -> jax.Array:
    """``logits`` ``[B, V]`` with -inf for tokens that are not among the fewest likely ones.

    >>> import jax.numpy as jnp
    >>> logits = jnp.log(jnp.array([[0.5, 0.125, 0.375]]))
    >>> jnp.isfinite(within_top_p(logits, 0.75)).tolist()
    [[True, False, True]]
    """
    if top_p >= 1:
        return logits
    ordered = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(ordered)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of the more likely ones
    number = jnp.sum(before < top_p, axis=-1, keepdims=True)
    least = jnp.take_along_axis(ordered, jnp.maximum(number - 1, 0), axis=-1)
    return jnp.where(logits >= least, logits, -jnp.inf)
