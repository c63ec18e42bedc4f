"""The CUDA engine on emulated GPUs, called with numpy arrays.

    emulator = Emulator(library, seed=1)
    group = Group((0, 1))
    out = [emulator.dispatch(group, rank, geometry, topk_idx[rank], [x[rank]]) for rank in (0, 1)]
    emulator.synchronize()
    out[0].rows, out[0].group_sizes, ...

Results hold garbage until `synchronize` has run the launches. It also checks that nothing was
written next to a buffer, into an operand, or to any buffer of a rank whose kernel has ended.
"""

from __future__ import annotations

import ctypes as c
import dataclasses
import functools
import itertools
import shutil
import tempfile
import zlib
from types import SimpleNamespace

import numpy as np

from freeio_jax.layout import dropless_capacity

#: How a call exchanges its rows. "through buffers" is a large call with so many assignments that
#: places and routes do not fit in the GPU blocks.
PROTOCOLS = ("small", "large", "through buffers")

#: Protocols of combine: also with the kernel for few multiprocessors, which else is not used.
COMBINE_PROTOCOLS = (*PROTOCOLS, "few", "few, through buffers")

#: The engine's own list, core/dtype.h: `Emulator` checks that.
DTYPES = ["float64", "float32", "bfloat16", "float16", "float8_e5m2", "float8_e4m3fn"]

#: Signals between hosts, as in xla_ffi/hosts/device/wire.cuh.
SIGNALS = ("header", "parcel", "answer", "credit", "gave up")

GUARD_BYTES = 64
GARBAGE = 0xA5


class EngineError(RuntimeError):
    """What the engine's host side returned."""


class MachineError(RuntimeError):
    """The kernels deadlocked, or used the machine in a way that no GPU allows."""


_structs = []


def _struct(name, *fields):
    """A twin of the C++ struct; `Emulator` checks that it has the same size."""
    struct = type(name, (c.Structure,), {"_fields_": list(fields)})
    _structs.append(struct)
    return struct


def _pointers(*names):
    return [(name, c.c_void_p) for name in names]


_MAX_LEAVES = 16
_LAYOUT = (
    *("num_ranks", "num_tokens", "top_k", "num_experts", "capacity", "alignment", "zero_tail"),
)
_Site = _struct(
    "Site",
    *((name, c.c_int64) for name in _LAYOUT),
    *_pointers("gpus"),
    ("mesh_device", c.c_uint32),
    ("instance", c.c_uint32),
    ("rank", c.c_int32),
    ("is_start", c.c_int32),
    *((name, c.c_int64) for name in ("program", "number", "run", "num_sms", "starts_num_sms")),
)
_ROUTES = ("dest_rank", "dest_row", "row_source")
_ROW_TYPE = [("dtype", c.c_int32), ("width", c.c_int64)]


class _LeafType(c.Structure):
    _fields_ = (("row_bytes", c.c_int64), ("row_type", c.c_uint64))


_DispatchTypes = _struct(
    "DispatchTypes",
    ("routed", c.c_bool),
    ("num_leaves", c.c_int32),
    ("leaves", _LeafType * _MAX_LEAVES),
)
_CombineTypes = _struct("CombineTypes", ("weighted", c.c_bool), *_ROW_TYPE)
_CombineTransposeTypes = _struct(
    "CombineTransposeTypes", ("rows", c.c_bool), ("weights", c.c_bool), *_ROW_TYPE
)
_NamedBuffers = _struct("NamedBuffers", ("count", c.c_int32), *_pointers("names", "addresses"))
_Place = _struct(
    "Place",
    ("process", c.c_int32),
    ("num_peers", c.c_int32),
    *_pointers("peers", "pids", "sockets"),
    ("num_gpus", c.c_int32),
    *_pointers("gpus", "owners", "ordinals"),
)


@dataclasses.dataclass(frozen=True)
class Place:
    """This process in a pod.

    Attributes:
      process: its number.
      peers: (number, pid, connected socket) of each other process.
      gpus: (process, ordinal there) of all GPUs, by number.
    """

    process: int
    peers: tuple
    gpus: tuple

    def ordinals(self):
        """Ordinals of this process's GPUs, by number."""
        return {
            number: ordinal
            for number, (process, ordinal) in enumerate(self.gpus)
            if process == self.process
        }


@dataclasses.dataclass(frozen=True)
class Group:
    """The GPUs of one EP group, by rank, and the mesh devices that they are."""

    gpus: tuple
    mesh_devices: tuple | None = None

    @property
    def size(self):
        return len(self.gpus)

    def mesh_device(self, rank):
        return (self.mesh_devices or self.gpus)[rank]


@dataclasses.dataclass(frozen=True)
class Start:
    """The name of a call that only starts its exchange. `Emulator.done` waits for it.

    Attributes:
      number: of the start in its program.
      program: which one.
      run: of the program.
      num_sms: multiprocessors of the exchange; 0: the setting.
    """

    number: int
    program: int = 1
    run: int = 1
    num_sms: int = 0


_NO_GEOMETRY = SimpleNamespace(**dict.fromkeys(_LAYOUT, 1))


def capacity_of(geometry):
    """Packed rows of one rank."""
    if geometry.capacity is not None:
        return geometry.capacity
    return dropless_capacity(
        num_ranks=geometry.num_ranks,
        num_tokens=geometry.num_tokens,
        top_k=geometry.top_k,
        num_experts=geometry.num_experts,
        alignment=geometry.alignment,
    )


class _Buffer:
    """Device memory of one array, with guards on both sides.

    Operands have a ``value``. They are there when XLA's stream comes to the call. They and scratch
    are dead when the kernel of their GPU has ended, or at done if the call has only started it: XLA
    may use their memory for something else, and so does `Emulator`.
    """

    def __init__(self, what, shape, dtype, value=None, *, allocate, offset=0, scratch=False):
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        self.what = what
        self.scratch = scratch
        self.dead = scratch or value is not None
        self.memory = allocate(size + 2 * GUARD_BYTES + 256)
        self.memory[...] = GARBAGE
        # Aligned as XLA's buffers are, or off by `offset` bytes.
        self.begin = GUARD_BYTES + -(self.memory.ctypes.data + GUARD_BYTES) % 128 + offset
        self.end = self.begin + size
        self.bytes = self.memory[self.begin : self.end]
        self.array = self.bytes.view(dtype).reshape(shape)
        self.before = None
        if value is not None:
            self.before = np.array(value, dtype).reshape(-1).view(np.uint8)
        self.at_end = np.empty(size, np.uint8)  # of the kernel
        self.address = self.memory.ctypes.data + self.begin

    def check(self, late_writes):
        what = self.what
        outside = (self.memory[: self.begin], self.memory[self.end :])
        assert all((part == GARBAGE).all() for part in outside), f"wrote next to {what}"
        if self.before is not None:
            assert np.array_equal(self.at_end, self.before), f"wrote into the operand {what}"
        late = self.bytes != (GARBAGE if self.dead else self.at_end)
        assert late_writes or not late.any(), f"wrote to {what} after its rank's kernel"


class Emulator:
    """GPUs and an engine of their own: what one of them has been through, no other one knows."""

    def __init__(
        self,
        library,
        *,
        seed=0,
        num_gpus=8,
        num_sms=3,
        shared_bytes=227 << 10,
        timeout=60.0,
        place=None,
        native_atomics=True,
    ):
        # One library holds one engine, for as long as the process lives.
        with tempfile.NamedTemporaryFile(suffix=".so") as copy:
            shutil.copyfile(library, copy.name)
            self._library = c.CDLL(copy.name)
        for name in (
            *("emulator_synchronize", "engine_start", "engine_dispatch", "engine_combine"),
            *("engine_combine_transpose", "engine_join", "engine_leave", "engine_take_failure"),
            *("engine_state_of", "engine_set_epochs", "engine_take_note", "engine_done"),
            "engine_pairs",
        ):
            getattr(self._library, name).restype = c.c_char_p
        if self.phases:
            self._library.engine_take_timelines.restype = c.c_char_p
        self._library.engine_bytes_of.restype = c.c_int64
        for struct in _structs:
            name = struct.__name__
            assert self._library.engine_bytes_of(name.encode()) == c.sizeof(struct), name
        self._library.engine_dtype_name.restype = c.c_char_p
        names = [self._library.engine_dtype_name(i) for i in range(len(DTYPES) + 1)]
        assert names == [*(name.encode() for name in DTYPES), None]
        self._library.emulator_steps.restype = c.c_uint64
        self._library.emulator_driver_function.restype = c.c_void_p
        self._library.emulator_network_bytes.restype = c.c_int64
        self._library.emulator_shared_bytes_of_last_launch.restype = c.c_int64
        self._buffers = []  # of launches that have not run
        self._filled = []  # likewise: on their GPU's stream
        self._new_buffers = []  # of the next launch
        self._broken = False
        self._num_sms = num_sms
        self._launches = {}  # by (lane, GPU, peer)
        self._in_flight = {}  # by (GPU, start): its site and buffers
        #: Of the program whose synchronous calls come: the most multiprocessors that one of its
        #: starts asks for; None: it has no starts.
        self.starts_num_sms = None
        self._library.emulator_set_devices(num_gpus, num_sms)
        self._library.emulator_set_shared_bytes(c.c_int64(shared_bytes))
        self._library.emulator_set_native_atomics(c.c_int(native_atomics))
        self.set_num_sms(num_sms)  # all of them: by itself the engine leaves some to others
        self.set_seed(seed)
        self.set_timeout(timeout)
        #: Takes a number of bytes, gives memory that GPUs reach.
        self.allocate = functools.partial(np.empty, dtype=np.uint8)
        if place is None:
            self._ordinals = {ordinal: ordinal for ordinal in range(num_gpus)}
            ordinals = (c.c_int32 * num_gpus)(*range(num_gpus))
            self._check(self._library.engine_start(ordinals, num_gpus))
        else:
            self._join(place)

    def _join(self, place):
        self._ordinals = place.ordinals()
        self.set_real_time(True)
        columns = {
            **dict(zip(("peers", "pids", "sockets"), zip(*place.peers, strict=True), strict=True)),
            "gpus": range(len(place.gpus)),
            **dict(zip(("owners", "ordinals"), zip(*place.gpus, strict=True), strict=True)),
        }
        arrays = {name: np.array(list(column), np.int32) for name, column in columns.items()}
        pointers = {name: array.ctypes.data for name, array in arrays.items()}
        sizes = {"num_peers": len(place.peers), "num_gpus": len(place.gpus)}
        self._check(
            self._library.engine_join(c.byref(_Place(process=place.process, **sizes, **pointers)))
        )

    def leave(self):
        """Leaves the pod, as shutdown() does."""
        self._check(self._library.engine_leave())

    def take_failure(self):
        """What became of an exchange that failed, once for each GPU; None: nothing new."""
        text = self._library.engine_take_failure()
        return text.decode() if text else None

    def take_timelines(self, gpu):
        """In a build with time stamps, of each CTA of the last exchange: when it began and ended,
        and how long it spent in each of `phases`, as ``_native.cuda.take_timelines`` returns it."""
        numbers = np.zeros((self._num_sms, 2 + len(self.phases)), np.uint64)
        count = c.c_int32()
        pointer = numbers.ctypes.data_as(c.c_void_p)
        self._check(self._library.engine_take_timelines(gpu, pointer, c.byref(count)))
        return [
            (begin, end, spent)
            for begin, end, *spent in numbers[: count.value].astype(int).tolist()
        ]

    @property
    def phases(self):
        """What `take_timelines` tells of; empty in a build without time stamps."""
        if not hasattr(self._library, "engine_phase_name"):
            return ()
        name = self._library.engine_phase_name
        name.restype = c.c_char_p
        return tuple(text.decode() for text in iter(map(name, itertools.count()).__next__, None))

    def take_note(self):
        """Who waits for whom for long; None: nothing new."""
        text = self._library.engine_take_note()
        return text.decode() if text else None

    def check_state(self, group):
        """What XLA does before each run of a program, whether it calls or replays its launches.

        Raises:
          EngineError: an exchange has failed on one of this process's GPUs in the group.
        """
        gpus = (c.c_int64 * group.size)(*group.gpus)
        self._check(self._library.engine_state_of(gpus, group.size))

    @property
    def mapped_bytes(self):
        """Of other processes."""
        self._library.engine_mapped_bytes.restype = c.c_int64
        return self._library.engine_mapped_bytes()

    def set_seed(self, seed):
        """Of the schedule from now on."""
        self._library.emulator_set_seed(c.c_uint64(int(seed)))

    def set_real_time(self, real):
        """Time-outs in seconds of the clock, for peers in other processes, and no busy waiting."""
        self._library.emulator_set_real_time(c.c_int(real))

    def set_capturing(self, capturing):
        """Whether some thread captures a CUDA graph."""
        self._library.emulator_set_capturing(c.c_int(capturing))

    def set_late_events(self, late):
        """Whether XLA's stream may also wait for the end of what it starts, as CUDA allows."""
        self._library.emulator_set_late_events(c.c_int(late))

    def set_patience(self, turns):
        """Turns of the scheduler between looks at the clock of those who poll, on average."""
        self._library.emulator_set_patience(c.c_uint32(turns))

    def set_timeout(self, seconds):
        self._library.engine_set_timeout(c.c_double(seconds))

    def set_num_sms(self, num_sms):
        self._library.engine_set_num_sms(c.c_int64(num_sms))

    def set_overlap_num_sms(self, num_sms):
        self._library.engine_set_overlap_num_sms(c.c_int64(num_sms))

    @property
    def max_in_flight(self):
        return self._library.engine_max_in_flight()

    def pairs(self, program, calls):
        """For each start of the program, whether it has a done; ``calls``: "s" or "d", in order."""
        found = self._library.engine_pairs(c.c_int64(program), calls.encode())
        return [one == ord("1") for one in found or b""]

    def compute(self, gpu, *, ctas=8, turns=200):
        """Launches a kernel that exchanges nothing, as a matrix product, on XLA's stream."""
        ordinal = self._ordinals[gpu]
        self._library.emulator_compute(ordinal, c.c_uint32(ctas), c.c_int64(turns))

    def set_protocol(self, name):
        """One of COMBINE_PROTOCOLS, for calls that allow it. Other calls use the next one."""
        slices = 2**31 if name == "small" else -1
        routes = -1 if "through buffers" in name else 2**31
        self.set_few_ctas(2**30 if "few" in name else 0)
        self._library.engine_set_most_sent(c.c_int64(routes), c.c_int64(slices))

    def set_few_ctas(self, ctas):
        """On how many CTAs at most a large combine takes the kernel for few of them."""
        self._library.engine_set_few_ctas(c.c_int32(ctas))

    def shared_bytes_of_last_launch(self):
        """Bytes of shared memory that the last launched kernel asked for."""
        return self._library.emulator_shared_bytes_of_last_launch()

    def set_hosts(self, num_gpus, per_host, window_bytes=1 << 20, *, linked=False):
        """Shares the GPUs out among hosts; all calls are then those of groups that span hosts.

        Args:
          num_gpus: of all hosts; 0: all GPUs are on one host again.
          per_host: of each.
          window_bytes: of a part of a half of a window.
          linked: GPUs of different hosts reach each other by a link, too.
        """
        self._library.emulator_set_hosts(
            num_gpus, per_host, c.c_int64(window_bytes), c.c_int(linked)
        )

    def set_network_faults(self, *, ignores_fences=False, lost=(), unawaited=()):
        """What the network does wrong, for tests that show what kernels rely on.

        Args:
          ignores_fences: what is put and signalled arrives in any order.
          lost: kinds of SIGNALS that never arrive.
          unawaited: kinds for which the kernels do not wait.
        """
        lost, unawaited = (
            c.c_uint32(sum(1 << SIGNALS.index(kind) for kind in kinds))
            for kinds in (lost, unawaited)
        )
        self._library.emulator_set_network_faults(c.c_int(ignores_fences), lost, unawaited)

    def set_gone(self, gpu, pe, why=1):
        """As if the process of a GPU of another host had gone (why=1: ended, 2: left)."""
        self._library.emulator_set_gone(gpu, pe, c.c_uint32(why))

    @property
    def network_bytes(self):
        """Put between hosts so far, without signals."""
        return self._library.emulator_network_bytes()

    def set_epochs(self, group, epoch):
        """As if each two of the group's GPUs had made so many exchanges."""
        gpus = (c.c_int32 * group.size)(*group.gpus)
        self._check(self._library.engine_set_epochs(gpus, group.size, c.c_uint32(epoch)))

    def divide(self, n, d):
        """Quotient and remainder as kernels find them."""
        return self._library.engine_quotient(n, d), self._library.engine_remainder(n, d)

    @property
    def steps(self):
        """Switches between threads so far."""
        return self._library.emulator_steps()

    def driver(self, name, *types):
        """A function of the driver, by name and the types of its arguments."""
        address = self._library.emulator_driver_function(name.encode())
        return c.CFUNCTYPE(c.c_int, *types)(address)

    def is_broken(self):
        """Whether an error came up, or launches are left: not to be used by another test."""
        return self._broken or bool(self._buffers)

    def close(self):
        """Gives the threads' stacks back. The machine cannot be used after it."""
        self._library.emulator_close()

    def synchronize(self, *, late_writes=False):
        """Runs what was launched, on all GPUs.

        Peers of a rank that gave up may write to it before they hear of that: ``late_writes``.
        """
        error = self._library.emulator_synchronize()
        buffers, self._buffers = self._buffers, []
        self._filled.clear()
        if error:
            self._broken = True
            raise MachineError(error.decode())
        for buffer in buffers:
            buffer.check(late_writes)

    # --- Operations of one rank ------------------------------------------------------------------

    def dispatch(self, group, rank, geometry, topk_idx, leaves, *, offset=0, **call):
        """Launches dispatch; the results' fields are those of the handle, and ``rows``."""
        rows = capacity_of(geometry)
        experts = geometry.num_experts // geometry.num_ranks
        shapes = {
            "dest_rank": topk_idx.shape,
            "dest_row": topk_idx.shape,
            "row_source": (rows,),
            "group_sizes": (experts,),
            "expert_load": (experts,),
            "num_dropped": (),
            "num_invalid": (),
        }
        out = {name: self._new(name, shape, np.int32) for name, shape in shapes.items()}
        words, _, _ = self._scratch(group, rank, geometry)
        places = self._new("places", (words,), np.uint64, scratch=True)
        by_source = places.array.reshape(geometry.num_ranks, -1)
        lane = _lane_of(call)
        for source, words in enumerate(by_source):
            # The worst that can be in the memory: words that look as if they had arrived.
            words[...] = self._epoch(lane, group.gpus[rank], group.gpus[source]) << 32 | 1
        types, leaf_buffers, packed = self._leaves(leaves, rows, offset)
        types.routed = True
        buffers = {"topk_idx": self._in("topk_idx", topk_idx), "places": places}
        buffers |= out | leaf_buffers
        self._launch("dispatch", group, rank, geometry, types, buffers, **call)
        return SimpleNamespace(rows=packed, **{name: buffer.array for name, buffer in out.items()})

    def dispatch_along(self, group, rank, geometry, handle, leaves, *, offset=0, **call):
        """Launches dispatch along a handle; the list of packed rows."""
        types, buffers, packed = self._leaves(leaves, capacity_of(geometry), offset)
        buffers |= self._routes(handle)
        self._launch("dispatch", group, rank, geometry, types, buffers, **call)
        return packed

    def combine(self, group, rank, geometry, handle, expert_out, weights=None, **call):
        """Launches combine; the sums."""
        width = int(np.prod(expert_out.shape[1:]))
        _, elements, words = self._scratch(group, rank, geometry, width)
        sums = self._new("sums", (geometry.num_tokens, width), expert_out.dtype)
        partial_sums = self._new("partial_sums", (elements,), expert_out.dtype, scratch=True)
        flags = self._new("flags", (words,), np.uint32, scratch=True)
        flags.array[...] = 1  # the worst that can be in the memory
        buffers = {
            **self._routes(handle),
            "expert_out": self._in("expert_out", expert_out),
            "sums": sums,
            "partial_sums": partial_sums,
            "flags": flags,
        }
        if weights is not None:
            buffers["weights"] = self._weights(weights, expert_out.dtype)
        types = _CombineTypes(
            weighted=weights is not None, dtype=_dtype_number(expert_out.dtype), width=width
        )
        self._launch("combine", group, rank, geometry, types, buffers, **call)
        return sums.array.reshape(geometry.num_tokens, *expert_out.shape[1:])

    def combine_transpose(
        self, group, rank, geometry, handle, cotangent, *, weights=None, expert_out=None, **call
    ):
        """Launches combine_transpose; the gradients by rows (given weights) and by weights (given
        expert outputs), or None."""
        width = int(np.prod(cotangent.shape[1:]))
        accumulator = _accumulator(cotangent.dtype)
        buffers = {**self._routes(handle), "tokens": self._in("tokens", cotangent)}
        rows = grads = None
        if weights is not None:
            rows = self._new("rows", (capacity_of(geometry), width), cotangent.dtype)
            buffers |= {"weights": self._weights(weights, cotangent.dtype), "rows": rows}
        if expert_out is not None:
            grads = self._new("weight_grads", handle.dest_rank.shape, accumulator)
            buffers |= {"expert_out": self._in("expert_out", expert_out), "weight_grads": grads}
        types = _CombineTransposeTypes(
            rows=rows is not None,
            weights=grads is not None,
            dtype=_dtype_number(cotangent.dtype),
            width=width,
        )
        self._launch("combine_transpose", group, rank, geometry, types, buffers, **call)
        return (
            None if rows is None else rows.array.reshape(-1, *cotangent.shape[1:]),
            None if grads is None else grads.array,
        )

    # --- Buffers and launches --------------------------------------------------------------------

    def _epoch(self, lane, gpu, peer):
        """Number of the next exchange of two GPUs in a lane."""
        return self._launches.get((lane, gpu, peer), 0) + 1

    def _keep(self, buffer):
        self._new_buffers.append(buffer)
        return buffer

    def _new(self, what, shape, dtype, **options):
        return self._keep(_Buffer(what, shape, dtype, allocate=self.allocate, **options))

    def _in(self, what, value, offset=0):
        value = np.asarray(value)
        return self._keep(
            _Buffer(what, value.shape, value.dtype, value, allocate=self.allocate, offset=offset)
        )

    def _routes(self, handle):
        return {name: self._in(name, getattr(handle, name)) for name in _ROUTES}

    def _weights(self, weights, dtype):
        return self._in("weights", weights.astype(_accumulator(dtype)))

    def _leaves(self, leaves, rows, offset):
        tokens = [self._in(f"tokens[{i}]", leaf, offset) for i, leaf in enumerate(leaves)]
        packed = [
            self._new(f"rows[{i}]", (rows, *leaf.shape[1:]), leaf.dtype, offset=offset)
            for i, leaf in enumerate(leaves)
        ]
        types = _DispatchTypes(num_leaves=len(leaves))
        for i, leaf in enumerate(leaves):
            types.leaves[i].row_bytes = int(np.prod(leaf.shape[1:])) * leaf.dtype.itemsize
            types.leaves[i].row_type = zlib.crc32(f"{leaf.dtype}{leaf.shape[1:]}".encode())
        buffers = {buffer.what: buffer for buffer in (*tokens, *packed)}
        return types, buffers, [buffer.array for buffer in packed]

    def _site(self, group, rank, geometry, instance=1, start=None):
        """With an array that it points to, which lives as long."""
        name = {"is_start": 0} if start is None else {"is_start": 1, **dataclasses.asdict(start)}
        site = _Site(
            starts_num_sms=-1 if self.starts_num_sms is None else self.starts_num_sms,
            **name,
            **{
                **{name: getattr(geometry, name) for name in _LAYOUT},
                "capacity": capacity_of(geometry),
            },
            mesh_device=group.mesh_device(rank),
            instance=instance,
            rank=rank,
        )
        site.gpus_array = np.array(group.gpus, np.int32)
        site.gpus = site.gpus_array.ctypes.data
        return site

    def _scratch(self, group, rank, geometry, width=0):
        """Elements of dispatch's scratch buffer, and of combine's two."""
        elements = (c.c_int64 * 3)()
        site = self._site(group, rank, geometry)
        self._library.engine_scratch(c.byref(site), c.c_int64(width), elements)
        return tuple(elements)

    def _launch(
        self, name, group, rank, geometry, types, buffers, *, instance=1, device=None, start=None
    ):
        """``buffers``: by their names in xla_ffi/core/operand_order.h."""
        expected = group.mesh_device(rank)
        device = self._in("device", np.uint32(expected if device is None else device))
        buffers = {"device": device, **buffers}
        names = (c.c_char_p * len(buffers))(*(key.encode() for key in buffers))
        addresses = (c.c_void_p * len(buffers))(*(buffer.address for buffer in buffers.values()))
        named = _NamedBuffers(len(buffers), c.addressof(names), c.addressof(addresses))
        site = self._site(group, rank, geometry, instance, start)
        function = getattr(self._library, f"engine_{name}")
        mine, self._new_buffers = self._new_buffers, []
        self._fill(group.gpus[rank], mine)
        self._check(function(c.byref(site), c.byref(types), c.byref(named)))
        gpu = group.gpus[rank]
        if start is None:
            self._retire(gpu, mine)
        else:
            self._in_flight[gpu, start] = site, mine
        for peer in group.gpus:
            pair = (_lane_of({"start": start}), gpu, peer)
            self._launches[pair] = self._epoch(*pair)

    def _fill(self, gpu, buffers):
        """XLA's stream computes the operands before the call."""
        self._filled += buffers
        for buffer in buffers:
            if buffer.before is not None:
                self._library.emulator_fill(
                    self._ordinals[gpu],
                    c.c_void_p(buffer.address),
                    c.c_size_t(buffer.bytes.size),
                    buffer.before.ctypes.data_as(c.c_void_p),
                )

    def _retire(self, gpu, buffers):
        """XLA may use the memory of dead buffers when its stream comes here."""
        self._buffers += buffers
        for buffer in buffers:
            self._library.emulator_retire(
                self._ordinals[gpu],
                c.c_void_p(buffer.address),
                c.c_size_t(buffer.bytes.size),
                buffer.at_end.ctypes.data_as(c.c_void_p),
                buffer.dead,
            )

    def done(self, group, rank, start, *, copied=False):
        """Waits for what a call with ``start=`` has started; then its results are there.

        ``copied``: as if XLA had copied a result before.
        """
        gpu = group.gpus[rank]
        site, buffers = self._in_flight.pop((gpu, start), (None, []))
        if site is None:  # it was never started, or has been waited for
            site = self._site(group, rank, _NO_GEOMETRY, start=start)
        scratch = sum(buffer.scratch for buffer in buffers)
        error = self._library.engine_done(c.byref(site), scratch, copied)
        self._retire(gpu, buffers)
        self._check(error)

    def abandon(self, group, rank, start):
        """As XLA does when a program ends with an error before done: takes back the buffers."""
        gpu = group.gpus[rank]
        _, buffers = self._in_flight.pop((gpu, start))
        self._retire(gpu, buffers)

    def _check(self, error):
        if error:
            self._broken = True
            raise EngineError(error.decode())


def _dtype_number(dtype):
    return DTYPES.index(np.dtype(dtype).name)


def _accumulator(dtype):
    return np.float64 if dtype == np.float64 else np.float32


def _lane_of(call):
    """Of a call with these options."""
    return 0 if call.get("start") is None else 1
