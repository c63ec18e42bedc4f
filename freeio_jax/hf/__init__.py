"""Checkpoints of Hugging Face: opened without torch, for the Flax layers."""

from freeio_jax.hf.checkpoint import Checkpoint, open
from freeio_jax.hf.load import Weights, load_moe, moe_layers
from freeio_jax.hf.options import moe_config, moe_options

__all__ = [
    "Checkpoint",
    "Weights",
    "load_moe",
    "moe_config",
    "moe_layers",
    "moe_options",
    "open",
]
