"""What makes hosts of processes of one machine, without GPUs: network/over_tcp.py."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys

import over_tcp
import pytest
from turns import take_turns

#: Prints the host's name, and what is in shared memory that the host's first process has made.
LOOK = """
import json, os, socket, sys, time
from multiprocessing import resource_tracker, shared_memory

name, rank = sys.argv[1], int(os.environ["JAX_PROCESS_ID"])
first = rank % int(os.environ["TESTS_RANKS_PER_HOST"]) == 0
memory = shared_memory.SharedMemory(name, create=first, size=8)
if first:
    memory.buf[0] = rank
    print(json.dumps([socket.gethostname(), memory.buf[0]]), flush=True)
    sys.stdin.readline()
    memory.close()
    memory.unlink()
else:
    print(json.dumps([socket.gethostname(), memory.buf[0]]), flush=True)
    resource_tracker.unregister(memory._name, "shared_memory")  # the first process removes it
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand-ins")
    try:
        over_tcp.compile_stand_ins(folder)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return folder


def test_only_processes_of_one_host_share_memory(folder):
    name = f"freeio_jax-{os.getpid()}"
    found = os.environ | over_tcp.own_hosts(folder, 4, 2)
    processes = []
    seen = []
    for rank in range(4):
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", LOOK, name],
                env=found | {"JAX_PROCESS_ID": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        seen.append(json.loads(processes[-1].stdout.readline()))
    for process in processes:
        process.communicate("\n", timeout=60)
    assert seen == [["host0", 0], ["host0", 0], ["host1", 2], ["host1", 2]]
    assert [process.returncode for process in processes] == [0] * 4


def test_memory_of_the_cpu_is_mapped_where_it_is(folder):
    library = ctypes.CDLL(str(folder / "libgdrapi.so"))
    library.gdr_open.restype = ctypes.c_void_p
    gdr = ctypes.c_void_p(library.gdr_open())
    memory = ctypes.create_string_buffer(64)
    address, handle = ctypes.c_ulong(ctypes.addressof(memory)), ctypes.c_ulong()
    size = ctypes.c_size_t(64)
    assert library.gdr_pin_buffer(gdr, address, size, 0, 0, ctypes.byref(handle)) == 0
    mapped = ctypes.c_void_p()
    assert library.gdr_map(gdr, handle, ctypes.byref(mapped), size) == 0
    assert mapped.value == ctypes.addressof(memory)
    assert library.gdr_copy_to_mapping(handle, mapped, b"rows", ctypes.c_size_t(4)) == 0
    assert memory.raw[:4] == b"rows"
    assert library.gdr_unpin_buffer(gdr, handle) == 0


@pytest.mark.parametrize("package", ["no_such_package", "no_such_package.of_anybody"])
def test_a_missing_wheel_is_named(package):
    with pytest.raises(ModuleNotFoundError, match="libucx-cu13"):
        over_tcp.libraries(package)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "3", "--hosts", "2", "x.py"], "-n 3 does not divide by --hosts 2"),
        (["-n", "2", "--hosts", "0", "x.py"], "-n 2 does not divide by --hosts 0"),
        (["-n", "2"], "which program?"),
        (["-n", "2", "x.py"], "there is no NVIDIA GPU here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_gets_one_clear_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["over_tcp.py", *arguments])
    with pytest.raises(SystemExit):
        over_tcp.main()
    assert message in capsys.readouterr().err


def test_processes_take_turns_on_the_gpus_that_there_are():
    found = take_turns(["3", "5"], 5)
    assert found["CUDA_VISIBLE_DEVICES"] == "3,5,3,5,3"
    assert 3 * float(found["XLA_PYTHON_CLIENT_MEM_FRACTION"]) < 0.8
