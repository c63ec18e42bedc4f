"""One process of a pod of emulated GPUs: what test_emulated_pods.py forks.

All processes draw the same random numbers, so each knows what all ranks do, launches what its own
GPUs do, and checks what they return.
"""

from __future__ import annotations

import contextlib
import ctypes as c
import json
import os
import signal
import struct
import sys
import time
import traceback

import numpy as np
import oracle
from emulated import PROTOCOLS, Emulator, EngineError, Group, Place, Start, capacity_of
from helpers import Geometry, assert_bitwise, routing, values
from test_emulated_memory import Driver

#: The process that has imported this module.
IMPORTED_IN = os.getpid()

POOL_BYTES = 2 << 20

#: Its number, `Channel` in core/channels.h.
CUDA_CHANNEL = struct.pack("=I", 1)

#: `Peers::Message` in cuda/peers.cc: kind, GPU, region, bytes.
MESSAGE = struct.Struct("@iiIQ")


class Pool:
    """Memory that XLA would take its buffers from: one allocation that other processes can map."""

    def __init__(self, machine):
        self._driver = Driver(machine)
        self._handle = self._driver.create()
        self._memory, self._address = self._driver.map(self._handle)
        self._next = 0

    def allocate(self, size):
        if self._next + size > POOL_BYTES:
            self._next = 0  # what lay there has been used
        begin, self._next = self._next, self._next + -(-size // 256) * 256
        return self._memory[begin : begin + size]

    def free(self):
        del self._memory
        self._driver.unmap(self._address)
        assert self._driver("cuMemRelease", self._handle) == 0


class Process:
    """This process's part of exchanges among all GPUs."""

    def __init__(self, machine, place, rng, sockets):
        self.machine, self.place, self.rng, self.sockets = machine, place, rng, sockets
        self.mine = sorted(place.ordinals())
        self.group = Group(tuple(range(len(place.gpus))))
        self.runs = 0

    def layer(self, group=None, *, protocol=PROTOCOLS[0], starts=False):
        """dispatch, dispatch along, combine and its gradients; every result is checked.

        ``starts``: all but combine are started, and run beside combine and compute.
        """
        rng, group = self.rng, group or self.group
        geometry = Geometry(
            group.size,
            num_tokens=int(rng.integers(1, 20)),
            top_k=int(rng.integers(1, 5)),
            num_experts=group.size * int(rng.integers(1, 5)),
            capacity=int(rng.integers(8, 40)) if rng.random() < 0.5 else None,
        )
        topk_idx = routing(rng, geometry, "holes")
        x = values(rng, (group.size, geometry.num_tokens, int(rng.choice([3, 8, 68]))), "float32")
        weights = rng.standard_normal(geometry.topk_shape).astype(np.float32)
        mine = [rank for rank, gpu in enumerate(group.gpus) if gpu in self.mine]
        if not mine:
            return
        machine = self.machine
        machine.set_protocol(protocol)
        placement = geometry.place(topk_idx, capacity_of(geometry))
        rows = oracle.dispatch(x, placement)
        call = [{"start": Start(n, run=self.runs)} if starts else {} for n in range(3)]
        self.runs += 1

        def finish(*numbers):
            for r in mine if starts else ():
                machine.compute(group.gpus[r])
                for number in numbers:
                    machine.done(group, r, call[number]["start"])
            machine.synchronize()

        out = {
            r: machine.dispatch(group, r, geometry, topk_idx[r], [x[r]], **call[0]) for r in mine
        }
        finish(0)
        for r in mine:
            assert_bitwise(out[r].rows[0], rows[r], "rows")
            assert_bitwise(out[r].group_sizes, placement.group_sizes[r], "group_sizes")
            assert_bitwise(out[r].num_dropped, placement.num_dropped[r], "num_dropped")
        along = {
            r: machine.dispatch_along(group, r, geometry, out[r], [x[r]], **call[1]) for r in mine
        }
        grads = {
            r: machine.combine_transpose(
                group, r, geometry, out[r], x[r], weights=weights[r], expert_out=rows[r], **call[2]
            )
            for r in mine
        }
        z = {r: machine.combine(group, r, geometry, out[r], rows[r], weights[r]) for r in mine}
        finish(1, 2)
        expected = oracle.combine(rows, placement, geometry.topk_shape, weights)
        for r in mine:
            assert_bitwise(along[r][0], rows[r], "rows along the handle")
            assert np.array_equal(z[r], expected[r])
            self._check_gradients(r, grads[r], placement, x, rows, weights)

    @staticmethod
    def _check_gradients(rank, grads, placement, x, rows, weights):
        by_rows, by_weights = np.zeros_like(rows[rank]), np.zeros_like(weights[rank])
        for (s, t, k), (dest, row) in placement.row_of.items():
            if dest == rank:
                by_rows[row] = weights[s, t, k] * x[s, t]
            if s == rank:
                by_weights[t, k] = x[s, t] @ rows[dest, row]
        assert_bitwise(grads[0], by_rows, "gradient by rows")
        np.testing.assert_allclose(grads[1], by_weights, rtol=1e-4, atol=1e-4)


def wait_for_all():
    """Until every process of the pod is here."""
    print("WAITING", flush=True)
    sys.stdin.readline()


# --- Scenarios: each is run by every process ------------------------------------------------------


def layers(process):
    for i in range(8):
        process.layer(protocol=PROTOCOLS[i % len(PROTOCOLS)])


def started_layers(process):
    process.machine.set_overlap_num_sms(1)
    process.machine.starts_num_sms = 0
    for i in range(8):
        process.layer(protocol=PROTOCOLS[i % len(PROTOCOLS)], starts=True)


def groups(process):
    """Side by side, within a process and across."""
    gpus = range(len(process.place.gpus))
    half = len(gpus) // 2
    for _ in range(3):
        for parts in ([gpus[:half], gpus[half:]], [gpus[::2], gpus[1::2]], [gpus]):
            for part in parts:
                process.layer(Group(tuple(part)))


def growing_pool(process):
    """Regions appear one after the other, not in all processes at the same time."""
    for i in range(10):
        if i % len((*process.place.peers, 0)) == process.place.process:
            process.machine.allocate = Pool(process.machine).allocate
        process.layer(protocol=PROTOCOLS[i % len(PROTOCOLS)])


def growing_pool_while_capturing(process):
    """XLA captures a graph meanwhile, which calls beside its launches would spoil."""
    process.machine.set_capturing(True)
    growing_pool(process)


def replaced_region(process):
    """A region is given back, and another one gets its addresses."""
    pool = Pool(process.machine)
    addresses = set()
    for _ in range(6):
        process.machine.allocate = pool.allocate
        process.layer()
        addresses.add(pool._address.value)
        pool.free()
        pool = Pool(process.machine)
    print(f"{len(addresses)} different addresses")


def late_process(process):
    if process.place.process == 1:
        time.sleep(1.0)
    process.layer()


def plain_memory(process):
    """Memory that cannot be exported, as that of XLA's platform allocator."""
    process.machine.allocate = lambda size: np.empty(size, np.uint8)
    try:
        process.layer()
    except EngineError as error:
        print(f"ERROR {error}")


def other_allocator(process):
    """Its memory could be exported, but not for long."""
    os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "BFC"  # the default one
    process.layer()
    mapped = process.machine.mapped_bytes
    os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"
    process.machine.allocate = Pool(process.machine).allocate
    try:
        process.layer()
    except EngineError as error:
        print(f"ERROR {error}")
    assert process.machine.mapped_bytes == mapped


def killed(process):
    process.layer()
    if process.place.process == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    process.machine.check_state(process.group)
    try:
        process.layer()
    except AssertionError as error:  # results of an exchange that failed are no data
        print(f"SPOILED {str(error).splitlines()[0] or 'results'}")
    # Both where XLA only replays launches, and where it calls for them.
    for call in (lambda: process.machine.check_state(process.group), process.layer):
        try:
            call()
        except EngineError as error:
            print(f"ERROR after {time.monotonic() - begin:.2f} s: {error}")


def _start(process, number=1):
    """Starts a dispatch on this process's GPUs; its name."""
    start, geometry = Start(number, run=process.runs), Geometry(process.group.size, 6, 2, 4)
    process.machine.starts_num_sms = 0
    for rank in process.mine:
        ids, x = np.zeros((6, 2), np.int32), np.ones((6, 4), np.float32)
        process.machine.dispatch(process.group, rank, geometry, ids, [x], start=start)
    return start


def _finish(process, start):
    for rank in process.mine:
        process.machine.done(process.group, rank, start)
    process.machine.synchronize()


def killed_in_flight(process):
    """A process dies where its exchange is in flight. The other one hears of it at done."""
    process.layer(starts=True)
    start = _start(process)
    if process.place.process == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    process.machine.synchronize()
    for call in (lambda: _finish(process, start), lambda: _start(process, 2), process.layer):
        try:
            call()
        except EngineError as error:
            print(f"ERROR after {time.monotonic() - begin:.2f} s: {error}")


def leaves_in_flight(process):
    """shutdown() waits for what is in flight. Its done comes too late."""
    process.layer(starts=True)
    start = _start(process)
    process.machine.leave()
    assert process.machine.mapped_bytes == 0
    try:
        _finish(process, start)
    except EngineError as error:
        print(f"ERROR {error}")


def _sends(process, text):
    """Process 1 sends process 0 ``text`` on the CUDA engine's channel, and makes no more calls."""
    process.layer()
    if process.place.process == 1:
        process.sockets[0].send(CUDA_CHANNEL + text)
        return
    with contextlib.suppress(AssertionError):
        process.layer()
    print(f"FAILURE {process.machine.take_failure()}")


def sends_too_short_a_message(process):
    _sends(process, b"garbage")


def sends_a_message_of_no_kind(process):
    _sends(process, MESSAGE.pack(77, 0, 0, 0))


def sends_a_block_of_a_gpu_of_another(process):
    _sends(process, MESSAGE.pack(0, 0, 0, 0))


def stays_away(process):
    process.layer()
    if process.place.process == 1:
        return  # it lives on until the others are done
    try:
        process.layer()
    except AssertionError:
        print(f"FAILURE {process.machine.take_failure()}")
        assert process.machine.take_failure() is None


def leaves_after_a_failure(process):
    process.layer()
    if process.place.process == 1:
        return
    with contextlib.suppress(AssertionError):
        process.layer()
    process.machine.leave()
    print(f"FAILURE {process.machine.take_failure()}")
    assert process.machine.take_failure() is None


def leaves(process):
    process.layer()
    assert process.machine.mapped_bytes > 0
    wait_for_all()  # a process that leaves too early ends the exchange of the others
    process.machine.leave()
    assert process.machine.mapped_bytes == 0
    for call in (lambda: process.machine.check_state(process.group), process.layer):
        try:
            call()
        except EngineError as error:
            print(f"ERROR {error}")


def run(told, sockets):
    place = Place(
        told["process"],
        tuple((peer, pid, sockets[peer].fileno()) for peer, pid in told["peers"]),
        tuple(tuple(gpu) for gpu in told["gpus"]),
    )
    rng = np.random.default_rng(told["seed"])
    try:
        machine = Emulator(
            told["library"],
            seed=told["seed"] + place.process,
            num_gpus=len(place.ordinals()),
            timeout=told["timeout"],
            place=place,
        )
    except EngineError as error:
        print(f"ERROR {error}")
    else:
        machine.allocate = Pool(machine).allocate
        process = Process(machine, place, rng, sockets)
        globals()[told["scenario"]](process)
    print("FINISHED", flush=True)
    # The peers may still read its memory. So it stays until the test says that they are done.
    sys.stdin.readline()


def main(test, sockets):
    """``test``: a socket to the test; it says what to do, and reads what is printed.

    ``sockets``: one to each other process of the pod.
    """
    sys.stdin, sys.stdout = test.makefile("r"), test.makefile("w")
    status = 1
    try:
        assert os.getppid() == IMPORTED_IN, "this process has imported again what is imported once"
        run(json.loads(sys.stdin.readline()), sockets)
        status = 0
    except BaseException:
        traceback.print_exc(file=sys.stdout)
    sys.stdout.flush()
    # Without the end of an interpreter, which would take the memory from under the peers.
    c.CDLL(None)._exit(status)
