"""Expert-parallel dispatch and combine for Mixture-of-Experts models, as JAX primitives."""

try:
    from freeio_jax import _native  # noqa: F401
except ImportError as error:
    raise ImportError(
        "freeio_jax: the native module freeio_jax._native is not built for this Python. In a "
        "source tree run `pip install -e .`; after a plain `pip install`, start Python outside of "
        f"the source tree. ({error})"
    ) from error

from freeio_jax import reference
from freeio_jax.collective import combine, dispatch
from freeio_jax.handle import Dispatched, Handle
from freeio_jax.overlap.pending import Pending, between, combine_start, dispatch_start
from freeio_jax.runtime import initialize, shutdown
from freeio_jax.settings import config

__all__ = [
    "Dispatched",
    "Handle",
    "Pending",
    "between",
    "combine",
    "combine_start",
    "config",
    "dispatch",
    "dispatch_start",
    "initialize",
    "reference",
    "shutdown",
]
