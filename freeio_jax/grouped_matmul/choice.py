"""Which implementation serves which product, and why.

The order is: own kernels, then tokamax. The first one serves that takes the dtype and the widths
and was right in a trial on the GPU at hand. Where none does, it is ``lax.ragged_dot`` or a loop in
plain XLA, whichever a measurement on that GPU finds faster: XLA has a fast ragged dot with some
versions of cuDNN, and a very slow one without. Each product is tried by itself, so the three may
come from different ones.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp

from freeio_jax import log
from freeio_jax.grouped_matmul import hopper, ragged, tiled, trial
from freeio_jax.grouped_matmul.product import Product


def _no_obstacle(product, dtype, widths):
    return None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to evaluate the products. Rows past the last group are zero in every result.

    Attributes:
      name: how users and :mod:`freeio_jax.info` call it.
      multiply: ``(product, left, right, group_sizes) -> result``.
      obstacle: ``(product, dtype, widths)``: why it cannot take them, in words; None: it can.
        ``widths`` are (K, N), or None: of any that it takes.
      merit: why it serves, where that needs no trial. Empty: others wrote it, or its compiler is
        not stable, so it serves only after a trial.
      slow: others are much faster, if they serve. Of those that are slow the fastest serves.
    """

    name: str
    multiply: Callable[..., jax.Array]
    obstacle: Callable[..., str | None] = _no_obstacle
    merit: str = ""
    slow: bool = False


def _tokamax_obstacle(product, dtype, widths):
    try:
        import tokamax  # noqa: F401
    except ImportError as error:
        return f"cannot be imported ({error})"
    return None


TILED = Implementation(
    "tiled",
    tiled.tiled,
    merit="lax.ragged_dot multiplies all rows with every group's matrix on CPU",
)
HOPPER = Implementation("hopper", hopper.hopper, hopper.obstacle)
RAGGED_DOT = Implementation("ragged_dot", ragged.ragged, slow=True)
TOKAMAX = Implementation("tokamax", ragged.by_tokamax, _tokamax_obstacle)
TILED_ON_GPU = Implementation(
    "tiled",
    functools.partial(tiled.tiled, tile_rows=512),
    merit="plain XLA, of which nothing is known to be wrong",
    slow=True,
)

#: For each platform that the products are tuned for, in the order of choice.
CANDIDATES = {
    "cpu": (TILED, RAGGED_DOT),
    "cuda": (HOPPER, TOKAMAX, RAGGED_DOT, TILED_ON_GPU),
}


#: Below this share of a dense product's speed a user is told.
SLOW = 0.4


@dataclasses.dataclass(frozen=True)
class Choice:
    """An implementation, and why it is this one, in words a user can act on."""

    implementation: Implementation
    reason: str


def choose(
    platform: str | None,
    product: Product,
    dtype,
    widths: tuple[int, int] | None = None,
    by: str | None = None,
) -> Choice:
    """What serves ``product`` on ``platform`` ("cpu", "cuda"; anything else: a platform of others).

    Args:
      platform: as JAX's lowering names it.
      product: which product.
      dtype: of both operands.
      widths: K and N of the weights; None: of widths that all take.
      by: a name: this one and no other, without a trial.

    Raises:
      ValueError: ``by`` names nothing that takes these operands on this platform.
    """
    candidates = CANDIDATES.get(platform, (RAGGED_DOT,))
    if by is not None:
        chosen = next((c for c in candidates if c.name == by), None)
        why = "there is none of this name" if chosen is None else None
        why = why or chosen.obstacle(product, jnp.dtype(dtype), widths)
        if why:
            raise ValueError(
                f"grouped_matmul: {by!r} does not serve on {platform}: {why}. There are "
                f"{', '.join(c.name for c in candidates)}."
            )
        return Choice(chosen, "asked for")
    if len(candidates) == 1:
        return Choice(candidates[0], "the only one for this platform")
    with _LOCK:
        return _first(platform, product, jnp.dtype(dtype), widths)


_LOCK = threading.Lock()


@functools.cache
def _first(platform, product, dtype, widths):
    passed_over, slow = [], []
    for candidate in CANDIDATES[platform]:
        why_not = candidate.obstacle(product, dtype, widths)
        if why_not is None and not candidate.merit:
            why_not = _wrong(candidate, product, dtype)
        if why_not is not None:
            passed_over.append(f"{version(candidate.name)}: {why_not}")
        elif candidate.slow:
            slow.append(candidate)
        else:
            return Choice(candidate, "; ".join([_merit(candidate), *passed_over]))
    shares = {c: trial.share_of_dense(product, dtype, c.name) for c in slow}
    fastest = max(slow, key=lambda c: -1.0 if math.isnan(shares[c]) else shares[c])
    speeds = ", ".join(f"{c.name} {share:.2f}" for c, share in shares.items())
    reason = f"{_merit(fastest)}; shares of a dense product's speed: {speeds}"
    chosen = Choice(fastest, "; ".join([reason, *passed_over]))
    if not shares[fastest] >= SLOW:  # nor where it could not be measured
        _tell_slow(fastest, product, dtype, chosen.reason)
    return chosen


def _merit(candidate):
    tried = f"right in a trial of {len(trial.CASES)} problems on this {_device_kind()}"
    return candidate.merit or tried


@functools.cache
def _wrong(candidate, product, dtype):
    return trial.wrong(product, dtype, candidate.name)


def _device_kind():
    return jax.local_devices()[0].device_kind


def version(name: str) -> str:
    """A package's name with its version; any other name as it is."""
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return name


@functools.cache
def _tell_slow(candidate, product, dtype, reason):
    log.logger.warning(
        "the experts' product will be slow: its %s (%s) comes from %s (%s). "
        "python -m freeio_jax.info shows all three products.",
        product.value,
        dtype.name,
        candidate.name,
        reason,
    )
