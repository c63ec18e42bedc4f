"""MoE layers for Flax: ``freeio_jax.flax.linen.MoE`` and ``freeio_jax.flax.nnx.MoE``."""

try:
    import flax as _flax  # noqa: F401
except ImportError as error:
    raise ImportError(
        "freeio_jax.flax needs Flax, which is not installed: pip install 'freeio_jax[flax]'."
    ) from error

from freeio_jax.flax import experts, linen, nnx
from freeio_jax.flax.config import MoEConfig
from freeio_jax.flax.custom_router import CustomRouter
from freeio_jax.flax.moe import moe
from freeio_jax.flax.report import Report
from freeio_jax.flax.router import Choice, Router

__all__ = [
    "Choice",
    "CustomRouter",
    "MoEConfig",
    "Report",
    "Router",
    "experts",
    "linen",
    "moe",
    "nnx",
]
