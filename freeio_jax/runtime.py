"""Settings, bootstrap, and the native engine's registration with XLA."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax

try:
    from freeio_jax import _native
except ImportError as error:
    raise ImportError(
        "freeio_jax: the native module freeio_jax._native is not built for this Python. In a "
        "source tree run `pip install -e .`; after a plain `pip install`, start Python outside of "
        f"the source tree. ({error})"
    ) from error


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError("it must be a positive, finite number of seconds")
    return seconds


@dataclasses.dataclass(frozen=True)
class _Setting:
    """One setting: ``config(name=...)`` or the environment variable ``FREEIO_<NAME>``."""

    default: Any
    parse: Callable[[Any], Any]
    apply: Callable[[Any], None]


_SETTINGS = {
    "timeout": _Setting(60.0, _seconds, _native.set_timeout),
}
_values: dict[str, Any] = {}


def _set(name: str, value: Any, origin: str) -> None:
    try:
        parsed = _SETTINGS[name].parse(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"freeio_jax: {origin}={value!r}: {error}.") from error
    _SETTINGS[name].apply(parsed)
    _values[name] = parsed


def _read_environment() -> None:
    known = {f"FREEIO_{name.upper()}": name for name in _SETTINGS}
    for variable in os.environ:
        if variable.startswith("FREEIO_") and variable not in known:
            raise ValueError(
                f"freeio_jax: unknown environment variable {variable}. Known: {', '.join(known)}."
            )
    for variable, name in known.items():
        _set(name, os.environ.get(variable, _SETTINGS[name].default), variable)


_read_environment()


def config(**settings: Any) -> dict[str, Any]:
    """Changes settings and returns all of them.

    Args:
      timeout: seconds that a rank waits for its peers in one exchange before it gets an error
        that names the missing ones. Default 60; environment variable ``FREEIO_TIMEOUT``. Holds
        for exchanges that begin after the call.

    Raises:
      TypeError: an unknown setting.
      ValueError: a value out of range; nothing is changed by that setting.

    >>> import freeio_jax as fio
    >>> fio.config(timeout=30)["timeout"]
    30.0
    >>> fio.config(timeout=60.0)
    {'timeout': 60.0}
    """
    unknown = set(settings) - set(_SETTINGS)
    if unknown:
        raise TypeError(
            f"freeio_jax.config: unknown setting(s) {sorted(unknown)}. Known: {sorted(_SETTINGS)}."
        )
    for name, value in settings.items():
        _set(name, value, name)
    return dict(_values)


def initialize() -> None:
    """Call after ``jax.distributed.initialize()`` in a program of several processes.

    In one process there is nothing to initialize, and calling this is harmless.

    Raises:
      NotImplementedError: there are several processes; exchanges between processes are not
        implemented yet.
    """
    _require_one_process()


def _require_one_process() -> None:
    if jax.process_count() > 1:
        raise NotImplementedError(
            f"freeio_jax: this program has {jax.process_count()} processes, and exchanges between "
            "processes are not implemented yet. Use one process with several devices, or "
            "freeio_jax.reference, which has the same contract."
        )


@functools.cache
def prepare(platform: str) -> None:
    """Registers the engine's handlers with XLA, once, when the first call is lowered.

    The backend must exist by then: registrations made before it does are replayed in an order
    that XLA refuses (state types must come before the handlers that use them).
    """
    _require_one_process()
    jax.local_devices(backend=platform)
    for name, registration in _native.ffi_types().items():
        jax.ffi.register_ffi_type(name, registration, platform=platform)
    for name, stages in _native.ffi_targets().items():
        jax.ffi.register_ffi_target(name, stages, platform=platform)
