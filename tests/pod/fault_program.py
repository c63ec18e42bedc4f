"""What a process of test_faults.py runs: exchanges, one of which goes wrong in process 1."""

import dataclasses
import os
import pathlib
import signal
import socket
import struct
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import freeio_jax as fio
from freeio_jax import bootstrap

FAULT = sys.argv[1]
TIMEOUT = 3.0


def make_step(mesh, num_tokens=4, capacity=None, dtype=np.float32):
    """A function that dispatches, combines and checks what came back."""
    ranks, sharding = mesh.size, NamedSharding(mesh, P("expert"))

    def layer(tokens, topk_idx):
        out = fio.dispatch(
            tokens, topk_idx, num_experts=ranks, axis_name="expert", capacity=capacity
        )
        return fio.combine(out.tokens, out.handle)

    layer = jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))
    rng = np.random.default_rng(0)
    tokens = rng.integers(-8, 8, (ranks * num_tokens, 5)).astype(dtype)
    topk_idx = rng.permuted(np.tile(np.arange(ranks), (len(tokens), 1)), axis=1).astype(np.int32)

    def step():
        args = [
            jax.make_array_from_callback(a.shape, sharding, lambda index, a=a: a[index])
            for a in (tokens, topk_idx)
        ]
        z = jax.block_until_ready(layer(*args))
        for shard in z.addressable_shards:
            np.testing.assert_array_equal(
                np.asarray(shard.data), np.asarray(ranks * tokens[shard.index], z.dtype)
            )

    return step


def kill_myself():
    report("FAULT")
    os.kill(os.getpid(), signal.SIGKILL)


def keep_connections(_culprit):
    """So that the fault can write into them, past the engine."""
    connect = bootstrap.connect

    def connect_and_keep(*args, **kwargs):
        connected = connect(*args, **kwargs)
        connections.extend(os.dup(peer.connection.fileno()) for peer in connected[0])
        return connected

    bootstrap.connect = connect_and_keep


connections = []


def deliver_late(culprit):
    """Once ``is_slow`` is set, process 1 hears after its time-out that a peer is done."""
    if not culprit:
        return
    connect = bootstrap.connect

    def connect_by_relay(*args, **kwargs):
        peers, hosts = connect(*args, **kwargs)
        return [dataclasses.replace(p, connection=relay(p.connection)) for p in peers], hosts

    bootstrap.connect = connect_by_relay


is_slow = threading.Event()


def relay(outer):
    """The end of a connection whose messages go through this program to ``outer``, and back."""
    end, inner = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end.setblocking(False)
    outer.setblocking(True)
    for source, sink in ((outer, inner), (inner, outer)):
        threading.Thread(target=forward, args=(source, sink, source is outer), daemon=True).start()
    return end


def forward(source, sink, incoming):
    while message := source.recv(1 << 20):
        if incoming and message.startswith(DONE) and is_slow.is_set():
            is_slow.clear()
            report("FAULT")
            time.sleep(1.5 * TIMEOUT)
        sink.send(message)
    sink.close()


def killed_before_it_connects(culprit):
    if culprit:
        bootstrap.Listener.connect = lambda *_: kill_myself()


def killed_when_connected(culprit):
    connect = bootstrap.connect

    def connect_and_die(*args, **kwargs):
        connected = connect(*args, **kwargs)
        if culprit:
            kill_myself()
        for peer in connected[0]:
            while peer.process == 1 and pathlib.Path(f"/proc/{peer.pid}").exists():
                time.sleep(0.01)
        return connected

    bootstrap.connect = connect_and_die


def killed_before_initialize(culprit):
    if culprit:
        kill_myself()


IN_INITIALIZE = {
    "killed before initialize": killed_before_initialize,
    "killed before it connects": killed_before_it_connects,
    "killed when connected": killed_when_connected,
    "done comes late": deliver_late,
    "connection lost": keep_connections,
    "garbage": keep_connections,
    "garbage on a channel": keep_connections,
}

#: What is no message: of no channel, and of that of the CPU engine.
GARBAGE = {
    "garbage": b"\x01garbage",
    "garbage on a channel": struct.pack("=I", 0) + b"garbage",
}


#: The beginning of a message `Message::Kind::kDone` (cpu/wire.h) on the CPU engine's channel.
DONE = struct.pack("=Ii", 0, 1)


def main():
    jax.distributed.initialize()
    me = jax.process_index()
    culprit = me == 1
    mesh = Mesh(np.array(jax.devices()), ("expert",))
    fio.config(timeout=TIMEOUT)
    if FAULT in IN_INITIALIZE:
        IN_INITIALIZE[FAULT](culprit)
    if FAULT != "not initialized":
        fio.initialize()
    if FAULT == "killed before":
        # Otherwise it might die while others are still in initialize().
        distributed.global_state.client.wait_at_barrier("initialized", 60_000)
        if culprit:
            kill_myself()
        make_step(mesh)()
        return
    if FAULT == "other programs":
        run_other_programs(mesh, culprit)
        return
    step = make_step(mesh)
    step()
    if FAULT == "killed between":
        if culprit:
            kill_myself()
    elif FAULT == "killed inside":
        if me == 2:
            time.sleep(100)
        if culprit:
            threading.Timer(0.5, kill_myself).start()
    elif FAULT.startswith("stopped") and culprit:
        report(f"FAULT {os.getpid()}")
        os.kill(os.getpid(), signal.SIGSTOP)
    elif FAULT == "done comes late":
        is_slow.set()
    elif FAULT == "connection lost":
        lose_connections_and_connect_again(step, culprit)
    elif FAULT == "link cut":
        if culprit:
            report("FAULT")
        time.sleep(2.0)  # the test cuts it meanwhile
    elif FAULT == "raises" and culprit:
        report("FAULT")
        raise ValueError("lost the plot")
    elif FAULT == "fewer calls" and culprit:
        report("FAULT")
        time.sleep(100)
    elif FAULT == "killed at some time" and culprit:
        threading.Timer(float(sys.argv[2]), kill_myself).start()
    elif FAULT == "halted at some time" and culprit:
        report(f"FAULT {os.getpid()}")
        threading.Timer(float(sys.argv[2]), os.kill, (os.getpid(), signal.SIGSTOP)).start()
    elif FAULT in GARBAGE and culprit:
        report("FAULT")
        for connection in connections:
            os.write(connection, GARBAGE[FAULT])
    elif FAULT == "shut down" and culprit:
        report("FAULT")
        fio.shutdown()
        time.sleep(100)
    for _ in range(1_000_000 if FAULT.endswith("at some time") else 3):
        step()


def lose_connections_and_connect_again(step, culprit):
    """As the error asks for."""
    if culprit:
        for connection in connections:
            socket.socket(fileno=os.dup(connection)).shutdown(socket.SHUT_RDWR)
    try:
        step()
    except Exception as error:
        report("LOST " + " ".join(str(error).split()))
    else:
        raise AssertionError("no error")
    fio.shutdown()
    fio.initialize()


def run_other_programs(mesh, culprit):
    """One after the other; each ends in an error, and the next one finds the processes as new."""
    ours = {
        "other dtype as wide": {"dtype": jnp.bfloat16},
    }
    theirs = {
        "other shape": {"num_tokens": 6},
        "other dtype": {"dtype": np.float16},
        "other dtype as wide": {"dtype": np.float16},
        "other capacity": {"capacity": 12},
    }
    for name in sys.argv[2:]:
        distributed.global_state.client.wait_at_barrier(name, 60_000)
        if not culprit:
            step = make_step(mesh, **ours.get(name, {}))
        elif name in theirs:
            step = make_step(mesh, **theirs[name])
        else:
            step = make_other_program(mesh)
        start = time.monotonic()
        try:
            step()
        except Exception as error:
            seconds = time.monotonic() - start
            report(f"{name} AFTER {seconds:.2f} s {' '.join(str(error).split())}")
        else:
            raise AssertionError(f"{name}: no error")
    make_step(mesh)()


def make_other_program(mesh):
    """Twice the exchange in one program."""

    def layer(tokens, topk_idx):
        for _ in range(2):
            out = fio.dispatch(tokens, topk_idx, num_experts=mesh.size, axis_name="expert")
            tokens = fio.combine(out.tokens, out.handle)
        return tokens

    layer = jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))
    tokens = np.zeros((4 * mesh.size, 7), np.float32)
    return lambda: jax.block_until_ready(layer(tokens, np.zeros((len(tokens), 1), np.int32)))


start = time.monotonic()


def report(text):
    # One write: lines of two threads must not mix. No orderly end: JAX's would wait for the others.
    print(f"{time.monotonic() - start:.2f} {text}", flush=True)


try:
    main()
except Exception as error:
    if "lost the plot" in str(error):
        raise
    report("ERROR " + " ".join(str(error).split()))
    time.sleep(1.0)  # the others see an error of their own, not the end of this process
    os._exit(3)
report("FINISHED")
