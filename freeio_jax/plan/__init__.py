"""``python -m freeio_jax.plan``: what an exchange would move, hold and take on given GPUs."""
