"""Expert-parallel dispatch and combine for Mixture-of-Experts models, as JAX primitives."""

from freeio_jax import reference
from freeio_jax.collective import combine, dispatch
from freeio_jax.handle import Dispatched, Handle
from freeio_jax.runtime import config, initialize, shutdown

__all__ = [
    "Dispatched",
    "Handle",
    "combine",
    "config",
    "dispatch",
    "initialize",
    "reference",
    "shutdown",
]
