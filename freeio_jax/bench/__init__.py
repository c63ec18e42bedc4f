"""``python -m freeio_jax.bench``: dispatch and combine against XLA's own collectives."""
