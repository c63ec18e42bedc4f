"""Checkpoints of Hugging Face: opened without torch, for the Flax layers."""

from freeio_jax.hf.checkpoint import Checkpoint, open

__all__ = ["Checkpoint", "open"]
