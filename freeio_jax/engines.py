"""The engines of this installation: what the lowering must know of each, and their registration."""

from __future__ import annotations

import atexit
import functools
import math
import threading

import jax
import numpy as np
from jax._src.mesh import get_concrete_mesh

from freeio_jax import _native, log, runtime

_WATCH_SECONDS = 0.1


def _register(native, registry: str) -> None:
    """Registers an engine's handlers with XLA.

    The backend must exist by then: registrations made before it does are replayed in an order
    that XLA refuses (state types must come before the handlers that use them).
    """
    for name, registration in native.ffi_types().items():
        jax.ffi.register_ffi_type(name, registration, platform=registry)
    for name, stages in native.ffi_targets().items():
        jax.ffi.register_ffi_target(name, stages, platform=registry)


class _Engine:
    """What the engines have in common: each lowered call prepares its engine and names itself.

    Attributes:
      needs_devices: whether the mesh's devices must be known when a call is lowered.
      takes_empty: whether custom calls may have buffers without elements on that platform.
    """

    def __init__(self):
        self._last_module: object = None

    def prepare(self, module: object) -> None:
        """Called when a call is lowered; ``module`` is an object that its module alone has.

        Raises:
          RuntimeError: there are several processes, and ``initialize`` was not called.
        """
        runtime.require_initialize()
        self._start()
        if module is not self._last_module:
            self._last_module = module
            _native.begin_module()

    def _start(self) -> None:
        raise NotImplementedError

    def attributes(self, module_context):
        """The module's name: part of what a call is called between processes."""
        return {"module": module_context.module.operation.attributes["sym_name"].value}


class CpuEngine(_Engine):
    """Devices of one process, or of several on one host."""

    needs_devices = False
    takes_empty = True

    @functools.cache  # noqa: B019 - engines live as long as the process
    def _start(self) -> None:
        local = jax.local_devices(backend="cpu")
        _register(_native, "cpu")
        log.logger.info(
            "CPU engine: %d of %d devices are in this process", len(local), jax.device_count("cpu")
        )

    def dispatch_scratch(self, layout, num_leaves):
        return ()

    def combine_scratch(self, layout, expert_out):
        return ()


_telling = threading.Lock()  # held until what was taken is logged


def _tell_failures() -> None:
    """Logs what went wrong on GPUs since the last time."""
    with _telling:
        while failure := _native.cuda.take_failure():
            log.logger.error("%s", failure)


def _watch(stop: threading.Event) -> None:
    while not stop.wait(_WATCH_SECONDS):
        _tell_failures()


def _stop_watching(stop: threading.Event, watcher: threading.Thread) -> None:
    stop.set()
    watcher.join()
    _tell_failures()  # the watcher may not have come to it


def _start_watching() -> None:
    """Says at once what went wrong on a GPU: XLA hears of it only by the next run there."""
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(stop,), name="freeio_jax failures", daemon=True)
    watcher.start()
    # While the interpreter is still there: a thread that comes back to it from C++ later than that
    # ends the whole process ("terminate called without an active exception").
    atexit.register(_stop_watching, stop, watcher)


def _gpus() -> list:
    """JAX's GPUs of all processes, whichever backend is the default one."""
    try:
        return jax.devices("cuda")
    except RuntimeError:  # there is none
        return []


class CudaEngine(_Engine):
    """GPUs that reach each other's memory: of one process, or of several on one host."""

    takes_empty = False  # XLA:GPU crashes when it compiles such a call

    def __init__(self):
        super().__init__()
        runtime.add_pod_member(runtime.PodMember(self._join, self._leave))

    @property
    def needs_devices(self):
        # A machine without the driver lowers for its CPU, also under a mesh without devices.
        return _native.cuda.has_driver()

    def _start(self) -> None:
        # In a pod the GPUs were made ready when it was joined.
        if jax.process_count() == 1:
            _native.cuda.start([device.local_hardware_id for device in self._numbers()])
        self._register()

    @functools.cache  # noqa: B019 - engines live as long as the process
    def _register(self) -> None:
        _register(_native.cuda, "CUDA")
        owned, mapped = _native.cuda.memory()
        log.logger.info(
            "CUDA engine: %d of %d GPUs are in this process; the engine owns %d bytes of each, and "
            "has mapped %d bytes of other processes",
            jax.local_device_count("cuda"),
            jax.device_count("cuda"),
            owned,
            mapped,
        )
        _start_watching()

    def _numbers(self) -> dict:
        """The number of each GPU of this host, which all of its processes agree on."""
        here = {jax.process_index(), *(runtime.members() or ())}
        devices = [device for device in _gpus() if device.process_index in here]
        devices.sort(key=lambda device: (device.process_index, device.id))
        return {device: number for number, device in enumerate(devices)}

    def _join(self) -> None:
        # JAX knows the CUDA ordinals of this process's devices alone.
        gpus = [
            (number, device.process_index, -1 if ordinal is None else ordinal)
            for device, number in self._numbers().items()
            for ordinal in [device.local_hardware_id]
        ]
        if gpus:
            _native.cuda.join(jax.process_index(), gpus)

    def _leave(self) -> None:
        try:
            _native.cuda.leave()  # waits for kernels, which may fail meanwhile
        finally:
            _tell_failures()

    def attributes(self, module_context):
        """The number of each mesh device's GPU; the kernels check that it is the right one.

        Where the mesh has no devices, they are taken to be JAX's, in their order. The one device
        of a mesh may be any: the attribute is empty.
        """
        mesh = module_context.axis_context.mesh
        if not isinstance(mesh, jax.sharding.Mesh) and not (known := get_concrete_mesh()).empty:
            mesh = known
        numbers = self._numbers()
        if isinstance(mesh, jax.sharding.Mesh):
            devices = mesh.devices.flat
        else:
            devices = [] if mesh.size == 1 else _gpus()[: mesh.size]
            if len(devices) < mesh.size > 1:
                raise ValueError(
                    f"freeio_jax: the mesh has {mesh.size} devices, of which none is known here, "
                    f"and JAX has {len(devices)} GPUs. Call under jax.set_mesh(mesh), or pass "
                    "mesh=... to jax.shard_map."
                )
        # Groups on other hosts are their processes' affair; one that spans hosts is refused when
        # it is called.
        gpus = [numbers.get(device, -1) for device in devices]
        return {"gpus": np.asarray(gpus, np.int64), **super().attributes(module_context)}

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

    def dispatch_scratch(self, layout, num_leaves):
        """The words of the routes: 64 bits each, as pairs of 32."""
        self.check(layout, num_leaves)
        words = _native.cuda.dispatch_scratch(layout.num_ranks, layout.num_tokens, layout.top_k)
        return (((2 * words,), np.uint32),)

    def combine_scratch(self, layout, expert_out):
        """Slots for the partial sums of the other ranks, and their arrival flags."""
        self.check(layout)
        width = math.prod(expert_out.shape[1:])
        slots, flags = _native.cuda.combine_scratch(
            layout.num_ranks, layout.num_tokens, layout.top_k, width
        )
        return ((slots, width), expert_out.dtype), ((flags,), np.uint32)


#: Engines of this installation, by the platform as JAX's lowering names it.
ENGINES = {"cpu": CpuEngine()}
if hasattr(_native, "cuda"):
    ENGINES["cuda"] = CudaEngine()
