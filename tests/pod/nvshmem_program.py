"""One process of test_nvshmem.py: initialize() with a stand-in for NVSHMEM, and no GPUs.

    python nvshmem_program.py SCENARIO

It prints what `freeio_jax.nvshmem` says then, or the error.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from types import ModuleType, SimpleNamespace

import jax
import numpy as np
from jax._src import distributed

import freeio_jax as fio
from freeio_jax import _native, nvshmem, transport
from freeio_jax.engines import ENGINES

SCENARIO = sys.argv[1]
ORDINAL = 0  # of a device of this process


def in_process_1(scenario):
    return scenario == SCENARIO and jax.process_index() == 1


class UniqueId:
    def __init__(self):
        self._data = np.zeros(1, [("version", np.int32), ("internal", np.int8, 124)])


class Nvshmem(ModuleType):
    """As much of nvshmem4py as is used."""

    def get_version(self):
        version = "3.5.21" if in_process_1("other_version") else "3.4.5"
        return SimpleNamespace(libnvshmem_version=version, nvshmem4py_version="0.4.1")

    def get_unique_id(self, empty):
        made = UniqueId()
        if not empty:
            made._data["internal"] = np.arange(124, dtype=np.int8)
        return made

    def init(self, device, uid, rank, nranks, initializer_method):
        assert (rank, nranks) == (jax.process_index(), jax.process_count())
        assert (uid._data["internal"] == np.arange(124)).all()
        assert (device.ordinal, initializer_method) == (ORDINAL, "uid")
        if in_process_1("fails"):
            raise RuntimeError("no network interface")
        if in_process_1("hangs"):
            time.sleep(1000)
        if SCENARIO == "fails":
            time.sleep(1000)  # as NVSHMEM does where another PE does not come

    def finalize(self):
        print("FINALIZED", flush=True)
        if in_process_1("end_hangs"):
            time.sleep(1000)
        if in_process_1("end_fails"):
            raise RuntimeError("a plugin is gone")


class Device(SimpleNamespace):
    def __init__(self, ordinal):
        super().__init__(ordinal=ordinal)

    def set_current(self):
        pass


class Native:
    """As _native.hosts."""

    built_with = "3.4.5"

    @staticmethod
    def landing_bytes(num_pes, num_hosts, part_bytes):
        return num_hosts * 6 * part_bytes

    @staticmethod
    def join(pe, ordinal, host_of_pe, gpu_of_pe, part_bytes):
        assert (pe, ordinal) == (jax.process_index(), ORDINAL)
        assert host_of_pe == [0, 1]
        assert gpu_of_pe == [0 if process == pe else -1 for process in range(2)]
        assert part_bytes == 32 << 20

    @staticmethod
    def try_network(memory_of_xla, size):
        assert memory_of_xla and size == 1 << 20

    @staticmethod
    def leave():
        print("LEFT", flush=True)
        return not in_process_1("loss")

    @staticmethod
    def reach():
        if SCENARIO == "by_link":
            return [1 - jax.process_index()], [], Native.landing_bytes(2, 2, 32 << 20)
        return [], [1 - jax.process_index()], Native.landing_bytes(2, 2, 32 << 20)


class Numbered:
    """A GPU of this process, for the engine."""

    @property
    def process_index(self):
        return jax.process_index()


def main():
    jax.distributed.initialize()
    gpu = jax.local_devices()[0]
    gpus = [gpu, gpu] if in_process_1("several_gpus") else [gpu]
    nvshmem._local_gpus = lambda: gpus
    mine = Numbered()
    ENGINES["cuda"] = SimpleNamespace(numbers=lambda: {mine: 0}, has_failed=in_process_1("failure"))
    if in_process_1("not_built"):
        vars(_native).pop("hosts", None)
    else:
        _native.hosts = Native
    if not in_process_1("not_installed"):
        sys.modules["nvshmem"] = ModuleType("nvshmem")
        sys.modules["nvshmem.core"] = Nvshmem("nvshmem.core")
    sys.modules["cuda"] = ModuleType("cuda")
    sys.modules["cuda.core"] = core = ModuleType("cuda.core")
    core.Device = Device
    ends = []
    # Comes after the handler that initialize() registers, and before JAX's, which waits for the
    # other process.
    atexit.register(lambda: print(f"ENDED in {time.monotonic() - ends[-1]:.1f} s", flush=True))
    began = time.monotonic()
    try:
        fio.initialize()
    except Exception as error:  # whatever it is, the test looks at it
        print(f"ERROR after {time.monotonic() - began:.1f} s: {error}".replace("\n", " "))
        sys.stdout.flush()
        # Process 0 has the coordinator, which the other one needs until it has its error.
        said = distributed.global_state.client
        if jax.process_index() == 1:
            said.key_value_set("said", "")
        else:
            said.blocking_key_value_get("said", 30_000)
        os._exit(0)  # without JAX's farewell: the other process may hang
    carrier = transport.choose("cuda")
    print(f"CARRIER {carrier.name}: {carrier.why or nvshmem.describe(nvshmem.state())}")
    if SCENARIO == "works":
        fio.shutdown()
        fio.initialize()  # NVSHMEM is not started a second time
        print(f"AGAIN {nvshmem.describe(nvshmem.state())}", flush=True)
    if SCENARIO == "jax_shutdown":
        fio.shutdown()
        jax.distributed.shutdown()
    elif SCENARIO == "child":
        if (child := os.fork()) == 0:
            ends.append(time.monotonic())
            sys.exit()
        os.waitpid(child, 0)
        fio.shutdown()  # this is not the end of the process
    sys.stdout.flush()
    ends.append(time.monotonic())


if __name__ == "__main__":
    main()
