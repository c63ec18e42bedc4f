"""The CUDA engine's Python side, where there need be no GPU."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import freeio_jax as fio
from freeio_jax import engines, runtime, watch
from freeio_jax.layout import Layout

needs_cuda_part = pytest.mark.skipif(
    not hasattr(engines._native, "cuda"),
    reason="the engine's C++ side is built where CMake finds nvcc",
)


@dataclasses.dataclass(frozen=True)
class Device:
    """What the engine asks of a device of JAX's."""

    process_index: int
    id: int
    local_hardware_id: int | None


class Native:
    """What the engine calls in C++."""

    def __init__(self):
        self.starter = None
        self.is_started = False
        self.joined = []
        self.failures = []
        self.failures_on_leaving = []

    def set_starter(self, start):
        self.starter = start

    def set_started(self):
        self.is_started = True

    def start(self, ordinals):
        self.joined.append((0, ordinals))

    def memory(self):
        return 0, 0

    def join(self, process, gpus):
        self.joined.append((process, gpus))

    def leave(self):
        self.failures += self.failures_on_leaving

    def take_note(self):
        return ""

    def take_failure(self):
        return self.failures.pop(0) if self.failures else ""


@pytest.fixture
def native(monkeypatch):
    native = Native()
    monkeypatch.setattr(engines._native, "cuda", native, raising=False)
    return native


@pytest.fixture
def engine(native, monkeypatch):
    monkeypatch.setattr(runtime, "_pod_members", [])
    made = engines.CudaEngine()
    # As after the first call that is lowered.
    monkeypatch.setattr(watch, "_sources", [(made.take_failure, logging.ERROR)])
    return made


def make_pod(monkeypatch, process, others, gpus):
    """Makes this ``process``, connected with ``others`` of its host.

    ``gpus``: (process, JAX's id, CUDA ordinal) of each that JAX has.
    """
    devices = [
        # JAX knows the ordinals of its own process's devices alone.
        Device(owner, number, ordinal if owner == process else None)
        for owner, number, ordinal in gpus
    ]
    monkeypatch.setattr(engines, "_gpus", lambda: devices)
    monkeypatch.setattr(engines, "jax", SimpleNamespace(process_index=lambda: process))
    monkeypatch.setattr(runtime, "processes_here", lambda: {process, *others})


#: Two GPUs of each of three processes, in no order; the ordinals of process 1 go down.
GPUS = [(1, 2, 1), (0, 1, 1), (2, 5, 1), (1, 3, 0), (0, 0, 0), (2, 4, 0)]


@pytest.mark.parametrize(
    ("process", "ordinals"),
    [(0, [0, 1, -1, -1, -1, -1]), (1, [-1, -1, 1, 0, -1, -1]), (2, [-1, -1, -1, -1, 0, 1])],
)
def test_all_processes_give_gpus_the_same_numbers(engine, native, monkeypatch, process, ordinals):
    make_pod(monkeypatch, process, {0, 1, 2} - {process}, GPUS)
    (member,) = runtime._pod_members
    member.join()
    expected = [(n, n // 2, ordinal) for n, ordinal in enumerate(ordinals)]
    assert native.joined == [(process, expected)]


def test_gpus_of_other_hosts_have_no_number(engine, native, monkeypatch):
    make_pod(monkeypatch, 1, [2], GPUS)
    numbers = {device.id: number for device, number in engine.numbers().items()}
    assert numbers == {2: 0, 3: 1, 4: 2, 5: 3}
    engine._join()
    assert native.joined == [(1, [(0, 1, 1), (1, 1, 0), (2, 2, -1), (3, 2, -1)])]


def test_without_gpus_nothing_is_joined(engine, native, monkeypatch):
    make_pod(monkeypatch, 0, [1], [])
    engine._join()
    assert native.joined == []


def test_the_first_instance_of_a_loaded_program_starts_the_engine(engine, native, monkeypatch):
    make_pod(monkeypatch, 0, [], [(0, 0, 3), (0, 1, 2)])
    watching = []
    monkeypatch.setattr(engines.jax, "process_count", lambda: 1, raising=False)
    for count in ("local_device_count", "device_count"):
        monkeypatch.setattr(engines.jax, count, lambda platform: 2, raising=False)
    monkeypatch.setattr(engines, "_watch_compilations", lambda: None)
    monkeypatch.setattr(watch, "watch", lambda take, level: watching.append(take.__name__))
    assert not native.is_started
    for _ in range(2):  # it may be made on two threads at once
        native.starter()
    assert native.is_started
    assert native.joined[0] == (0, [3, 2])
    assert watching == ["take_failure", "take_note"]


def test_handlers_are_registered_once_the_plugin_is_loaded(engine, native, monkeypatch):
    callbacks, registered = [], []
    monkeypatch.setattr(engines.xla_bridge, "register_plugin_callbacks", callbacks.append)
    monkeypatch.setattr(engines, "_register", lambda *args: registered.append(args))
    engine.register()
    assert registered == []
    for plugin in ("one", "another"):
        callbacks[0](c_api=plugin)
    parts = [native, *filter(None, [getattr(engines._native, "hosts", None)])]
    assert registered == [(part, "CUDA") for part in parts]


def test_failures_are_logged_before_leaving(engine, native, caplog):
    engine._leave()
    assert not engine.has_failed
    native.failures = ["one GPU failed"]
    native.failures_on_leaving = ["another GPU failed"]
    engine._leave()
    assert engine.has_failed
    said = [record.message for record in caplog.records if record.name == "freeio_jax"]
    assert said == ["one GPU failed", "another GPU failed"]


def test_failures_are_logged_where_leaving_fails(engine, native, monkeypatch, caplog):
    def leave():
        raise RuntimeError("cudaDeviceSynchronize")

    monkeypatch.setattr(native, "leave", leave)
    native.failures = ["one GPU failed"]
    with pytest.raises(RuntimeError, match="cudaDeviceSynchronize"):
        engine._leave()
    assert "one GPU failed" in caplog.text


def test_scratch_has_a_word_for_each_assignment_and_a_row_for_each_partial_sum(engine):
    layout = Layout.create(num_ranks=3, num_tokens=10, top_k=4, num_experts=6)
    assert engine.dispatch_scratch(layout, num_leaves=1) == (((2 * 3 * 10 * 4,), np.uint32),)
    rows = SimpleNamespace(shape=(layout.capacity, 3, 100), dtype=np.float32)
    slots = 10 * 2  # ranks other than the token's own
    slices = 3  # of at most 128 elements
    expected = ((slots, 300), np.float32), ((slots * slices,), np.uint32)
    assert engine.combine_scratch(layout, rows) == expected


@needs_cuda_part
def test_failures_are_looked_for_before_every_run():
    """XLA replays captured launches without a call of `execute`, but not without `initialize`."""
    targets = engines._native.cuda.ffi_targets()
    assert set(targets.pop("freeio_check")) == {"instantiate", "initialize", "execute"}
    operations = {"dispatch", "dispatch_along", "combine", "combine_transpose"}
    ends = {f"freeio_{name}{end}" for name in operations for end in ("", "_start")}
    assert set(targets) == ends | {"freeio_done"}
    # It costs the host's time, so once for a program is enough.
    for stages in targets.values():
        assert set(stages) == {"instantiate", "execute"}


@needs_cuda_part
def test_each_block_of_calls_has_one_that_looks_for_failures(monkeypatch):
    monkeypatch.setattr(engines.ENGINES["cuda"], "start", lambda: None)
    devices = np.asarray(jax.devices("cpu")[:2])
    mesh = jax.sharding.Mesh(devices, ("expert",))

    def layers(x, topk_idx):
        def layer(x, _):
            out = fio.dispatch(x, topk_idx, num_experts=4, axis_name="expert")
            return fio.combine(out.tokens, out.handle), None

        x, _ = layer(layer(x, None)[0], None)
        x, _ = jax.lax.scan(layer, x, length=3)
        return jax.lax.cond(topk_idx[0, 0] > 0, lambda x: layer(x, None)[0], lambda x: x + 1, x)

    spec = jax.sharding.PartitionSpec("expert")
    layers = jax.shard_map(layers, mesh=mesh, in_specs=spec, out_specs=spec)
    args = np.ones((4, 3), np.float32), np.zeros((4, 1), np.int32)
    for _ in range(2):  # another module has its own
        lowered = jax.jit(lambda *args: layers(*args)).trace(*args)
        text = lowered.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@freeio_dispatch(") == text.count("@freeio_combine(") == 4
        checks = [line for line in text.splitlines() if "@freeio_check(" in line]
        # Two layers in a row share one. The loop and the branch have their own.
        assert len(checks) == 3
        for check in checks:
            assert "has_side_effect = true" in check  # else XLA would drop it
            assert "gpus = dense<" in check
    text = lowered.lower(lowering_platforms=("cpu", "cuda")).as_text()
    # Here each call is in a branch of its own for each platform.
    for name in ("dispatch", "combine", "check"):
        assert text.count(f"@freeio_{name}(") == 8


WATCHED_PROGRAM = """
import builtins
import threading
import time

from freeio_jax import _native, watch


class Slow:
    # The interpreter's end takes its time, as it does where there is much to tidy up: long enough
    # for a thread that is still there to come back from C++.
    def __del__(self, sleep=time.sleep):
        sleep(0.3)


def look_often(take=_native.take_note):
    looked.set()
    for _ in range(100_000):
        take()
    return ""


looked = threading.Event()
builtins.slow = Slow()
watch._WATCH_SECONDS = 0  # the watcher is in C++ nearly always
watch.watch(look_often, 0)
looked.wait()
"""


def test_who_watches_for_failures_does_not_outlive_the_interpreter():
    for _ in range(3):
        ended = subprocess.run(
            [sys.executable, "-c", WATCHED_PROGRAM],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
