"""The CUDA engine among GPUs of several processes: one each, and two each where there are four.

Also between virtual hosts, where NVSHMEM carries the rows; and among more processes than there are
GPUs, which take turns on one.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest
from turns import take_turns

from freeio_jax.launch import Pod
from freeio_jax.launch.pod import visible_gpus

PROGRAM = Path(__file__).with_name("gpu_program.py")
NUM_GPUS = len(visible_gpus())

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(150),
    pytest.mark.skipif(NUM_GPUS < 1, reason="needs NVIDIA GPUs, and there is none"),
]

#: (processes, GPUs of each).
SHAPES = [(n, NUM_GPUS // n) for n in range(2, NUM_GPUS + 1) if NUM_GPUS % n == 0] or [(2, 1)]


@pytest.fixture
def run(monkeypatch):
    def run(scenario, *arguments, shape=(2, 1), num_hosts=1, **environment):
        needed = 1 if "CUDA_VISIBLE_DEVICES" in environment else shape[0] * shape[1]
        if needed > NUM_GPUS:
            pytest.skip(f"needs {needed} NVIDIA GPUs, there are {NUM_GPUS}")
        for name, value in {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.3", **environment}.items():
            monkeypatch.setitem(os.environ, name, value)
        lines = [[] for _ in range(shape[0])]
        pod = Pod(
            [str(PROGRAM), scenario, *arguments],
            num_processes=shape[0],
            devices_per_process=shape[1],
            num_hosts=num_hosts,
            platform="cuda",
            output=lambda rank, _stream, line: lines[rank].append(line),
        )
        status = pod.run()
        return pod, status, ["\n".join(text) for text in lines]

    return run


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scenario", ["layers", "groups"])
def test_exchanges(run, scenario, shape):
    _, status, said = run(scenario, shape=shape)
    assert status == 0, said
    assert all("FINISHED" in text for text in said)


def test_a_program_of_before_shutdown(run):
    _, status, said = run("again")
    assert status == 0, said
    assert all("jax.clear_caches()" in text for text in said), said


def check_few_ctas(run, **environment):
    _, status, said = run("few_ctas", **environment)
    assert status == 0, said
    assert all("FINISHED" in text for text in said), said
    if left_out := re.search("LEFT OUT: (.*)", said[0]):
        pytest.skip(left_out[1])


def test_combine_on_few_ctas(run):
    check_few_ctas(run)


def test_a_pool_that_grows(run):
    _, status, said = run("growth", XLA_PYTHON_CLIENT_PREALLOCATE="false")
    assert status == 0, said


@pytest.mark.parametrize("allocator", ["platform", "cuda_async"])
def test_an_allocator_whose_memory_cannot_be_shared(run, allocator):
    _, status, said = run("allocator", XLA_PYTHON_CLIENT_ALLOCATOR=allocator)
    assert status == 0, said
    for text in said:
        assert f"unset XLA_PYTHON_CLIENT_ALLOCATOR, which is {allocator} now" in text


def test_a_killed_process_is_named(run):
    pod, _, said = run("killed", "30")
    assert f"rank 1 of process 1 (pid {pod.processes[1].pid}) ended" in said[0], said
    assert float(said[0].split("ERROR after ")[1].split()[0]) < 15
    assert said[0].count("SPOILED") == 1, said


def test_a_process_that_stays_away_is_named(run):
    pod, _, said = run("stays_away", "3")
    assert f"waited 3 s for rank 1 of process 1 (pid {pod.processes[1].pid})" in said[0], said
    assert said[0].count("SPOILED") == 1, said


# --- Between hosts -------------------------------------------------------------------------------

BETWEEN_HOSTS = pytest.mark.skipif(
    importlib.util.find_spec("nvshmem") is None, reason="needs the extra `hosts`: nvshmem4py"
)
BY_NVSHMEM = {"num_hosts": 2, "FREEIO_TRANSPORT": "nvshmem"}


@BETWEEN_HOSTS
@pytest.mark.parametrize("scenario", ["layers", "groups", "growth"])
def test_exchanges_between_hosts(run, scenario):
    _, status, said = run(scenario, **BY_NVSHMEM)
    assert status == 0, said
    assert all("FINISHED" in text for text in said)


@BETWEEN_HOSTS
@pytest.mark.timeout(600)
def test_many_exchanges_between_hosts(run):
    _, status, said = run("soak", **BY_NVSHMEM)
    assert status == 0, said


@BETWEEN_HOSTS
def test_a_program_of_before_shutdown_between_hosts(run):
    _, status, said = run("again", **BY_NVSHMEM)
    assert status == 0, said
    assert all("jax.clear_caches()" in text for text in said), said


@BETWEEN_HOSTS
def test_a_killed_process_of_another_host_is_named(run):
    _, _, said = run("killed", "30", **BY_NVSHMEM)
    assert "rank 1 on host 1 of the group ended while it was waited for" in said[0], said
    assert float(said[0].split("ERROR after ")[1].split()[0]) < 5
    assert said[0].count("SPOILED") == 1, said


@BETWEEN_HOSTS
def test_a_process_of_another_host_that_stays_away_is_named(run):
    _, _, said = run("stays_away", "3", **BY_NVSHMEM)
    assert "waited 3 s for rank 1 on host 1 of the group" in said[0], said
    assert said[0].count("SPOILED") == 1, said


@BETWEEN_HOSTS
def test_without_nvshmem_xlas_collectives_carry_the_rows(run):
    _, status, said = run("layers", num_hosts=2, FREEIO_TRANSPORT="xla")
    assert status == 0, said
    assert all("XLA's collectives carry their rows: process 0" in text for text in said), said


# --- More processes than GPUs --------------------------------------------------------------------


def on_one_gpu(num_processes):
    return take_turns(visible_gpus()[:1], num_processes)


@pytest.mark.parametrize("num_processes", [2, 4, 8])
@pytest.mark.parametrize("scenario", ["layers", "groups"])
def test_exchanges_on_one_gpu(run, scenario, num_processes):
    _, status, said = run(scenario, shape=(num_processes, 1), **on_one_gpu(num_processes))
    assert status == 0, said
    assert all("FINISHED" in text for text in said)


@pytest.mark.timeout(300)
def test_combine_on_few_ctas_of_one_gpu(run):
    check_few_ctas(run, **on_one_gpu(2))


@BETWEEN_HOSTS
@pytest.mark.parametrize("num_processes, num_hosts", [(2, 2), (4, 2), (4, 4), (8, 2), (8, 4)])
@pytest.mark.parametrize("scenario", ["layers", "groups"])
def test_exchanges_between_hosts_on_one_gpu(run, scenario, num_processes, num_hosts):
    places = {"num_hosts": num_hosts, "FREEIO_TRANSPORT": "nvshmem"} | on_one_gpu(num_processes)
    _, status, said = run(scenario, shape=(num_processes, 1), **places)
    assert status == 0, said
    assert all("FINISHED" in text for text in said)
