"""Checkpoints of Hugging Face: opened without torch, for the Flax layers."""

from freeio_jax.hf.checkpoint import Checkpoint, open
from freeio_jax.hf.load import Weights, load_moe, moe_layers, tensors_of_layer
from freeio_jax.hf.options import moe_config, moe_options
from freeio_jax.hf.save import save

__all__ = [
    "Checkpoint",
    "Weights",
    "load_moe",
    "moe_config",
    "moe_layers",
    "moe_options",
    "open",
    "save",
    "tensors_of_layer",
]
