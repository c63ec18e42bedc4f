"""Settings, bootstrap, and the native engine's registration with XLA."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src.mesh import get_concrete_mesh

from freeio_jax import _native


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


def _sms(value: Any) -> int | None:
    sms = None if value is None else int(value)
    if sms is not None and sms < 1:
        raise ValueError("it must be a positive number of multiprocessors, or None")
    return sms


_SETTINGS = {
    "timeout": _Setting(60.0, _seconds, _native.set_timeout),
    "num_sms": _Setting(None, _sms, lambda sms: _native.set_num_sms(sms or 0)),
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
      num_sms: multiprocessors of a GPU that one exchange may use. Default None: the engine's
        choice; environment variable ``FREEIO_NUM_SMS``. Holds for programs and command buffers
        that begin after the call.

    Raises:
      TypeError: an unknown setting.
      ValueError: a value out of range; nothing is changed by that setting.

    >>> import freeio_jax as fio
    >>> fio.config(timeout=30)["timeout"]
    30.0
    >>> fio.config(timeout=60.0)
    {'timeout': 60.0, 'num_sms': None}
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
    """Starts the engine and registers its handlers with XLA, when the first call is lowered.

    The backend must exist by then: registrations made before it does are replayed in an order
    that XLA refuses (state types must come before the handlers that use them).
    """
    _require_one_process()
    devices = jax.local_devices(backend=platform)
    native = ENGINES[platform].start(devices)
    registry = platform.upper() if platform == "cuda" else platform
    for name, registration in native.ffi_types().items():
        jax.ffi.register_ffi_type(name, registration, platform=registry)
    for name, stages in native.ffi_targets().items():
        jax.ffi.register_ffi_target(name, stages, platform=registry)


class _CpuEngine:
    """What the lowering must know of the CPU engine."""

    platform = "cpu"
    needs_devices = False

    def start(self, devices):
        return _native

    def attributes(self, mesh):
        return {}

    def dispatch_scratch(self, layout):
        return ()

    def combine_scratch(self, layout, expert_out):
        return ()


class _CudaEngine:
    """What the lowering must know of the CUDA engine: its devices, its scratch, its limits."""

    platform = "cuda"

    @property
    def needs_devices(self):
        # A machine without the driver lowers for its CPU, also under a mesh without devices.
        return _native.cuda.has_driver()

    def start(self, devices):
        _native.cuda.start([device.local_hardware_id for device in devices])
        return _native.cuda

    def attributes(self, mesh):
        """The CUDA ordinal of each mesh device; the kernels check that it is the right one."""
        if not isinstance(mesh, jax.sharding.Mesh):
            mesh = get_concrete_mesh()
        if mesh.empty:
            raise ValueError(
                "freeio_jax: on GPUs the mesh's devices must be known when the program is lowered. "
                "Call under jax.set_mesh(mesh), or pass mesh=... to jax.shard_map."
            )
        ordinals = [device.local_hardware_id for device in mesh.devices.flat]
        return {"ordinals": np.asarray(ordinals, np.int64)}

    def check(self, layout, num_leaves=1):
        for name, value, most in (
            ("the number of ranks", layout.num_ranks, _native.cuda.max_ranks),
            ("num_experts", layout.num_experts, _native.cuda.max_experts),
            ("top_k", layout.top_k, _native.cuda.max_top_k),
            ("the number of token arrays", num_leaves, _native.cuda.max_leaves),
        ):
            if value > most:
                raise ValueError(
                    f"freeio_jax: {name} is {value}, and the CUDA engine takes at most {most}. "
                    "freeio_jax.reference has no such bound."
                )

    def dispatch_scratch(self, layout):
        """Route words: 64 bits for each assignment of each rank."""
        self.check(layout)
        return (((2 * layout.num_ranks * layout.num_assignments,), np.uint32),)

    def combine_scratch(self, layout, expert_out):
        """Slots for the partial sums of the other ranks, and their arrival flags."""
        self.check(layout)
        slots = layout.num_tokens * min(layout.top_k, layout.num_ranks - 1)
        width = math.prod(expert_out.shape[1:])
        # A slice has at least this many elements, or is the whole row.
        slices = max(1, -(-width // _native.cuda.sum_slice(layout.num_tokens)))
        return ((slots, width), expert_out.dtype), ((slots * slices,), np.uint32)


#: Engines of this installation, by the platform as JAX's lowering names it.
ENGINES = {"cpu": _CpuEngine()}
if hasattr(_native, "cuda"):
    ENGINES["cuda"] = _CudaEngine()
