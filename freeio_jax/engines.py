"""The engines of this installation: what the lowering must know of each, and their registration."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import threading

import jax
import numpy as np
from jax._src import dispatch, xla_bridge
from jax._src.interpreters import mlir
from jax._src.lib import _jax, xla_client
from jax._src.lib.mlir import ir
from jax._src.mesh import get_concrete_mesh

from freeio_jax import _native, log, runtime, watch


def _register(native, registry: str) -> None:
    """Registers an engine's handlers with XLA: state types before the handlers that use them.

    To be called where XLA takes them at once. Otherwise JAX queues them until there is a backend,
    and registers handlers before types, which XLA refuses.
    """
    for name, registration in native.ffi_types().items():
        jax.ffi.register_ffi_type(name, registration, platform=registry)
    for name, stages in native.ffi_targets().items():
        jax.ffi.register_ffi_target(name, stages, platform=registry)


@dataclasses.dataclass
class Room:
    """What the synchronous calls of a module leave to its starts, beside which they may run.

    Attributes:
      num_sms: the most multiprocessors that one of the starts asks for. 0 means the setting. None:
        the module has no start so far.
      calls: the synchronous calls so far, as operations of MLIR.
    """

    num_sms: int | None = None
    calls: list[ir.Operation] = dataclasses.field(default_factory=list)


class _Modules(threading.local):
    """The module that a thread lowers: its calls so far, and where they are."""

    key: object = None

    def _enter(self, module_context) -> None:
        # Each module has an iterator of its own; contexts within a module share it.
        if module_context.channel_iterator is not self.key:
            self.key, self.calls, self.places = module_context.channel_iterator, 0, set()
            self.starts, self.room = {}, Room()

    def next_call(self, module_context) -> int:
        self._enter(module_context)
        self.calls += 1
        return self.calls - 1

    def starts_of(self, module_context) -> dict:
        self._enter(module_context)
        return self.starts

    def room_of(self, module_context) -> Room:
        self._enter(module_context)
        return self.room

    def is_first_at(self, module_context, gpus: tuple[int, ...]) -> bool:
        """Whether these GPUs have no call yet in the block of operations that is being lowered."""
        self._enter(module_context)
        place = gpus, ir.InsertionPoint.current.block
        is_first = place not in self.places
        self.places.add(place)
        return is_first


_with_exchanges: set[str] = set()  # names of the modules in which a call was lowered


def _compiled(event: str, seconds: float, fun_name: str = "", **_) -> None:
    """Called by JAX when it has compiled a module, or loaded it from the compilation cache."""
    name = mlir.sanitize_name(fun_name).rstrip("_")
    if event == dispatch.BACKEND_COMPILE_EVENT and name in _with_exchanges:
        _native.compilation_ended(seconds)


@functools.cache
def _watch_compilations() -> None:
    jax.monitoring.register_event_duration_secs_listener(_compiled)


class _Engine:
    """What the engines have in common.

    Handlers are registered when this module is imported, so that programs which another process
    compiled find them. Registration starts no backend. The engine itself starts when the first call
    is lowered. Where all programs are loaded and none is lowered, it starts when XLA makes the
    first instance of a call.

    Args:
      native: the engine's part of the native module.

    Attributes:
      needs_devices: whether the mesh's devices must be known when a call is lowered.
      starts_apart: whether it has custom calls that start an exchange and do not wait for it.
      platform: as JAX's lowering names it.
      meets: whether it has a custom call that waits until all ranks of a group have come to it.
      suffix: of the names of its custom calls, behind the names of the primitives.
    """

    suffix = ""

    def __init__(self, native):
        self.native = native
        self._modules = _Modules()
        self._starting = threading.Lock()
        native.set_starter(self.start)

    def register(self) -> None:
        """Registers the handlers as soon as XLA takes them."""
        raise NotImplementedError

    def start(self) -> None:
        """Makes the engine ready for calls; called any number of times, on any thread.

        Raises:
          RuntimeError: there are several processes, and ``initialize`` was not called.
        """
        runtime.require_initialize()
        _watch_compilations()
        with self._starting:
            self._start()
        self.native.set_started()

    def _start(self) -> None:
        raise NotImplementedError

    def attributes(self, module_context):
        """The name of a call for the engines of all processes: its module, and its number there.

        Both are the same at each start of the program, so that JAX's persistent compilation cache
        knows the program again.
        """
        name = module_context.module.operation.attributes["sym_name"].value
        _with_exchanges.add(name)
        return {"module": name, "call": np.int64(self._modules.next_call(module_context))}

    def starts(self, module_context) -> dict:
        """The starts of the module that is being lowered, by number, for their dones."""
        return self._modules.starts_of(module_context)

    def room(self, module_context) -> Room:
        """What the synchronous calls of the module that is being lowered leave to its starts."""
        return self._modules.room_of(module_context)

    def program_check(self, module_context):
        """Attributes of a custom call ``freeio_check``, which a program needs beside its others.

        XLA asks it before each run whether the engine has failed. Each block of operations with
        calls has one, because XLA may remove a block, such as a branch that is never taken. None
        where the block has one already, or the engine has no such call.
        """
        return None


class CpuEngine(_Engine):
    """Devices of one process, or of several on one host."""

    needs_devices = False
    starts_apart = False
    platform = "cpu"
    meets = True

    @property
    def knows_hosts(self):
        """Whether it exchanges rows between hosts, too: virtual ones of one process."""
        return jax.process_count() == 1

    def __init__(self):
        super().__init__(_native)

    def register(self) -> None:
        # XLA for the CPU is part of jaxlib and takes handlers before there is a backend. JAX makes
        # these two calls when it makes a backend, but in the other order.
        xla_client.register_custom_type_handler("cpu", _jax.register_custom_type)
        xla_client.register_custom_call_handler("cpu", _jax.register_custom_call_target)
        _register(_native, "cpu")

    @functools.cache  # noqa: B019 - engines live as long as the process
    def _start(self) -> None:
        local = jax.local_devices(backend="cpu")
        log.logger.info(
            "CPU engine: %d of %d devices are in this process", len(local), jax.device_count("cpu")
        )
        watch.watch(_native.take_note, logging.WARNING)

    def attributes(self, module_context):
        """In several processes the name also has the mesh's devices, where they are known.

        So the calls of a program that runs on some devices, and then on others, have two names.
        """
        attributes = super().attributes(module_context)
        mesh = module_context.axis_context.mesh
        if jax.process_count() > 1 and isinstance(mesh, jax.sharding.Mesh):
            attributes["devices"] = np.array([d.id for d in mesh.devices.flat], np.int64)
        return attributes

    def dispatch_scratch(self, layout, num_leaves):
        return ()

    def combine_scratch(self, layout, expert_out):
        return ()


def _gpus() -> list:
    """JAX's GPUs of all processes, whatever the default backend is."""
    try:
        return jax.devices("cuda")
    except RuntimeError:  # there is none
        return []


class CudaEngine(_Engine):
    """GPUs that reach each other's memory: of one process, or of several on one host."""

    starts_apart = True
    platform = "cuda"
    meets = False
    knows_hosts = False
    has_failed = False  # an exchange of this process, as far as the log has been told

    def __init__(self):
        super().__init__(_native.cuda)
        runtime.add_pod_member(runtime.PodMember(self._join, self._leave))

    @property
    def needs_devices(self):
        # Without the driver only programs for the CPU run, which may have a mesh without devices.
        return _native.cuda.has_driver()

    def register(self) -> None:
        # XLA for GPUs is in a plugin, which JAX loads before it makes the first backend. JAX calls
        # this for each plugin that it has loaded.
        xla_bridge.register_plugin_callbacks(lambda c_api: self._register())

    @functools.cache  # noqa: B019 - engines live as long as the process
    def _register(self) -> None:
        _register(_native.cuda, "CUDA")
        if hasattr(_native, "hosts"):
            _register(_native.hosts, "CUDA")

    def _start(self) -> None:
        # In a pod, `_join` has made the GPUs ready.
        if jax.process_count() == 1:
            _native.cuda.start([device.local_hardware_id for device in self.numbers()])
        self._log_start()

    @functools.cache  # noqa: B019 - engines live as long as the process
    def _log_start(self) -> None:
        owned, mapped = _native.cuda.memory()
        log.logger.info(
            "CUDA engine: %d of %d GPUs are in this process; the engine owns %d bytes of each, and "
            "has mapped %d bytes of other processes",
            jax.local_device_count("cuda"),
            jax.device_count("cuda"),
            owned,
            mapped,
        )
        # XLA raises a failure only in the next run on that GPU. The log reports it at once.
        watch.watch(self.take_failure, logging.ERROR)
        watch.watch(_native.cuda.take_note, logging.WARNING)

    def take_failure(self) -> str:
        """The error of an exchange that has failed, once for each GPU; empty: nothing new."""
        failure = _native.cuda.take_failure()
        self.has_failed |= bool(failure)
        return failure

    def numbers(self) -> dict:
        """The number of each GPU of this host. All processes of the host count alike."""
        here = runtime.processes_here()
        devices = [device for device in _gpus() if device.process_index in here]
        devices.sort(key=lambda device: (device.process_index, device.id))
        return {device: number for number, device in enumerate(devices)}

    def _join(self) -> None:
        # JAX knows the CUDA ordinals of this process's devices alone.
        gpus = [
            (number, device.process_index, -1 if ordinal is None else ordinal)
            for device, number in self.numbers().items()
            for ordinal in [device.local_hardware_id]
        ]
        if gpus:
            _native.cuda.join(jax.process_index(), gpus)

    def _leave(self) -> None:
        try:
            _native.cuda.leave()  # waits for kernels, which may fail meanwhile
        finally:
            watch.tell()

    def attributes(self, module_context):
        """Also the number of each mesh device's GPU; kernels check that they run on that GPU."""
        gpus = self._gpus_of_mesh(module_context)
        return {"gpus": np.asarray(gpus, np.int64), **super().attributes(module_context)}

    def program_check(self, module_context):
        gpus = self._gpus_of_mesh(module_context)
        if not self._modules.is_first_at(module_context, tuple(gpus)):
            return None
        return {"gpus": np.asarray(gpus, np.int64)}

    def _gpus_of_mesh(self, module_context) -> list[int]:
        """The number of each mesh device's GPU.

        A mesh without devices is taken to have JAX's, in their order. The one device
        of a mesh may be any GPU, and there is no number then.
        """
        mesh = module_context.axis_context.mesh
        if not isinstance(mesh, jax.sharding.Mesh) and not (known := get_concrete_mesh()).empty:
            mesh = known
        numbers = self.numbers()
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
        # -1 is a GPU of another host, whose processes check it. A group that spans hosts is refused
        # when it is called.
        return [numbers.get(device, -1) for device in devices]

    def check(self, layout, num_leaves=1):
        """Raises ValueError where the kernels do not take a layout, with their bound."""
        for name, value, most in (
            ("the number of ranks", layout.num_ranks, _native.cuda_sizes.max_ranks),
            ("num_experts", layout.num_experts, _native.cuda_sizes.max_experts),
            ("top_k", layout.top_k, _native.cuda_sizes.max_top_k),
            ("the number of token arrays", num_leaves, _native.cuda_sizes.max_leaves),
        ):
            if value > most:
                raise ValueError(
                    f"freeio_jax: {name} is {value}, and the CUDA engine takes at most {most}. "
                    "freeio_jax.reference has no such bound."
                )

    def dispatch_scratch(self, layout, num_leaves):
        """The words of the places: 64 bits each, as pairs of 32."""
        self.check(layout, num_leaves)
        shape = layout.num_ranks, layout.num_tokens, layout.top_k
        words = _native.cuda_sizes.dispatch_scratch(*shape)
        return (((2 * words,), np.uint32),)

    def combine_scratch(self, layout, expert_out):
        """Slots for the partial sums of the other ranks, and their arrival flags."""
        self.check(layout)
        width = math.prod(expert_out.shape[1:])
        shape = layout.num_ranks, layout.num_tokens, layout.top_k
        slots, flags = _native.cuda_sizes.combine_scratch(*shape, width)
        return ((slots, width), expert_out.dtype), ((flags,), np.uint32)


class CudaEngineBetweenHosts:
    """The CUDA engine for groups that span hosts, whose rows NVSHMEM carries between them."""

    suffix = "_between_hosts"

    def __init__(self, engine: CudaEngine):
        self._engine = engine

    def __getattr__(self, name):
        return getattr(self._engine, name)

    # XLA shares work on a program among processes, for which the program must be the same in all of
    # them. So no attribute may depend on the host, as the numbers of GPUs do.

    def attributes(self, module_context):
        """Also the PE of each mesh device: its process."""
        mesh = module_context.axis_context.mesh
        pes = np.array([device.process_index for device in mesh.devices.flat], np.int64)
        return {"pes": pes, **_Engine.attributes(self._engine, module_context)}

    def program_check(self, module_context):
        """Asks for all GPUs of the process."""
        if not self._modules.is_first_at(module_context, ()):
            return None
        return {"gpus": np.zeros(0, np.int64)}

    # These kernels need no memory of XLA's, but the custom calls have the buffers.

    def dispatch_scratch(self, layout, num_leaves):
        self.check(layout, num_leaves)
        return (((1,), np.uint32),)

    def combine_scratch(self, layout, expert_out):
        self.check(layout)
        return ((1, 1), expert_out.dtype), ((1,), np.uint32)


#: Engines of this installation, by the platform as JAX's lowering names it.
ENGINES = {"cpu": CpuEngine()}
if hasattr(_native, "cuda"):
    ENGINES["cuda"] = CudaEngine()
for _engine in ENGINES.values():
    _engine.register()
