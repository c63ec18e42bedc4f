"""The CUDA engine among several processes, each with emulated GPUs of its own.

Memory is shared as between real GPUs: exported as file descriptors, sent over sockets, mapped.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing.forkserver
import os
import re
import signal
import socket
from pathlib import Path

import pod_program
import pytest
from test_emulated_many_ranks import MAX_RANKS as MANY_RANKS

HERE = Path(__file__).parent
TIMEOUT = 2.0


class Pod:
    """Processes that run one scenario, and what they print."""

    def __init__(self, context, libraries, scenario, gpus_of, seed, timeout=60.0):
        """``libraries``: the engine of each process."""
        count = len(gpus_of)
        sockets = {
            pair: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            for pair in itertools.combinations(range(count), 2)
        }
        for end in itertools.chain(*sockets.values()):
            end.setblocking(False)

        def sockets_of(process):
            return {
                pair[1 - pair.index(process)]: ends[pair.index(process)]
                for pair, ends in sockets.items()
                if process in pair
            }

        talks = [socket.socketpair() for _ in range(count)]
        self.processes = [
            context.Process(target=pod_program.main, args=(talks[process][1], sockets_of(process)))
            for process in range(count)
        ]
        for process in self.processes:
            process.start()
        for end in itertools.chain(*sockets.values(), (theirs for _, theirs in talks)):
            end.close()
        self._talks = [ours.makefile("rw") for ours, _ in talks]
        self._sockets = [ours for ours, _ in talks]
        gpus = [(p, ordinal) for p, number in enumerate(gpus_of) for ordinal in range(number)]
        for process, talk in enumerate(self._talks):
            told = {
                "process": process,
                "peers": [
                    (peer, started.pid)
                    for peer, started in enumerate(self.processes)
                    if peer != process
                ],
                "gpus": gpus,
                "library": str(libraries[process]),
                "scenario": scenario,
                "seed": seed,
                "timeout": timeout,
            }
            talk.write(json.dumps(told) + "\n")
            talk.flush()

    def run(self, *, waits=False):
        """What each process printed, once all have finished or died.

        ``waits``: each of them waits once for all others.
        """
        try:
            if waits:
                for talk in self._talks:
                    self._until(talk, "WAITING")
                for talk in self._talks:
                    talk.write("\n")
                    talk.flush()
            printed = [self._until(talk, "FINISHED") for talk in self._talks]
            for end in self._sockets:
                end.shutdown(socket.SHUT_WR)
            for process in self.processes:
                process.join(60)
                assert process.exitcode in (0, -signal.SIGKILL), printed
            return printed
        finally:
            for process in self.processes:
                process.kill()
            for end in (*self._talks, *self._sockets):
                end.close()

    @staticmethod
    def _until(talk, word):
        lines = []
        for line in talk:
            if line == f"{word}\n":
                return lines
            lines.append(line.rstrip())
        return [*lines, "DIED"]

    def who(self, process):
        return f"process {process} (pid {self.processes[process].pid})"


@pytest.fixture(scope="session")
def forks():
    """Forks processes from one that has imported what they run, as the imports take seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pod_program"])
    with pytest.MonkeyPatch.context() as patch:
        # Not every Python gives that process the path of this one.
        path = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
        multiprocessing.forkserver.ensure_running()
    return context


@pytest.fixture
def pod(emulator_library, forks, rng):
    def make(scenario, gpus_of, libraries=None, **options):
        libraries = libraries or [emulator_library] * len(gpus_of)
        return Pod(forks, libraries, scenario, gpus_of, int(rng.integers(2**31)), **options)

    return make


@pytest.mark.parametrize("gpus_of", [(1, 1), (2, 2), (1, 2, 1)], ids=str)
def test_layers(pod, gpus_of):
    assert pod("layers", gpus_of).run() == [[]] * len(gpus_of)


@pytest.mark.parametrize("gpus_of", [(1, 1), (1, 2, 1)], ids=str)
def test_layers_whose_exchanges_are_started(pod, gpus_of):
    assert pod("started_layers", gpus_of).run() == [[]] * len(gpus_of)


def test_groups_within_a_process_and_across(pod):
    assert pod("groups", (2, 2)).run() == [[], []]


@pytest.mark.parametrize("gpus_of", [(1, 1), (2, 1)], ids=str)
def test_regions_that_appear_later(pod, gpus_of):
    assert pod("growing_pool", gpus_of).run() == [[], []]


def test_regions_that_appear_while_a_graph_is_captured(pod):
    assert pod("growing_pool_while_capturing", (1, 1)).run() == [[], []]


def test_a_region_that_takes_the_addresses_of_another(pod):
    for (line,) in pod("replaced_region", (1, 1)).run():
        # At least once it did: else this has tested nothing.
        assert int(line.split()[0]) < 6


def test_a_process_that_comes_late_is_waited_for(pod):
    assert pod("late_process", (1, 1)).run() == [[], []]


def test_memory_that_cannot_be_shared(pod):
    for (line,) in pod("plain_memory", (1, 1)).run():
        assert "cannot be shared with the other processes" in line
        assert "XLA_PYTHON_CLIENT_ALLOCATOR" in line


def test_an_allocator_that_gives_each_buffer_memory_of_its_own(pod):
    for (line,) in pod("other_allocator", (1, 1)).run():
        assert "cannot be shared with the other processes" in line
        assert line.endswith("unset XLA_PYTHON_CLIENT_ALLOCATOR, which is platform now.")


def test_a_killed_process_is_noticed_at_once(pod):
    running = pod("killed", (1, 1))
    here, there = running.run()
    assert there == ["DIED"]
    spoiled, *errors = here
    assert spoiled.startswith("SPOILED")
    assert len(errors) == 2
    for error in errors:
        assert f"rank 1 of {running.who(1)} ended" in error
        assert float(error.split()[2]) < 30


def test_a_process_that_is_killed_with_an_exchange_in_flight(pod):
    running = pod("killed_in_flight", (1, 1))
    errors, there = running.run()
    assert there == ["DIED"]
    assert len(errors) == 3
    for error in errors:
        assert f"rank 1 of {running.who(1)} ended" in error
        assert float(error.split()[2]) < 30


def test_leaving_with_an_exchange_in_flight(pod):
    for (line,) in pod("leaves_in_flight", (1, 1)).run():
        assert "shutdown() was called" in line


@pytest.mark.parametrize(
    "scenario",
    [
        "sends_too_short_a_message",
        "sends_a_message_of_no_kind",
        "sends_a_block_of_a_gpu_of_another",
    ],
)
def test_garbage_instead_of_a_message(pod, scenario):
    running = pod(scenario, (1, 1))
    (failure,), _ = running.run()
    who = f"rank 1 of {running.who(1)}"
    assert f"{who} sent bytes that are no message of this engine" in failure, failure


@pytest.mark.timeout(900, method="thread")  # it may have to build one of them
def test_builds_for_different_numbers_of_ranks(pod, emulator_library):
    """Their GPU blocks have different sizes, so neither process maps the other's."""
    import build  # on the path where the emulator can be built

    libraries = [emulator_library, build.library(max_ranks=MANY_RANKS)]
    running = pod("layers", (1, 1), libraries=libraries)
    sizes = []
    for process, (line,) in enumerate(running.run()):
        here, there = (re.escape(running.who(p)) for p in (process, 1 - process))
        found = re.search(
            rf"ERROR INTERNAL: freeio_jax.initialize: {there} has GPU blocks of (\d+) bytes, and "
            rf"{here} has GPU blocks of (\d+) bytes\. All processes need the same build of "
            "freeio_jax: one version",
            line,
        )
        assert found, line
        sizes.append((int(found[1]), int(found[2])))
    assert sizes[0] == sizes[1][::-1]
    assert sizes[0][0] > sizes[0][1]


def test_a_process_that_stays_away_is_named(pod):
    running = pod("stays_away", (1, 1), timeout=TIMEOUT)
    (failure,), _ = running.run()
    assert f"rank 0 waited 2 s for rank 1 of {running.who(1)}" in failure


def test_a_failure_is_not_forgotten_on_leaving(pod):
    running = pod("leaves_after_a_failure", (1, 1), timeout=TIMEOUT)
    (failure,), _ = running.run()
    assert f"rank 0 waited 2 s for rank 1 of {running.who(1)}" in failure


def test_what_is_mapped_is_given_back(pod):
    for lines in pod("leaves", (1, 1)).run(waits=True):
        assert len(lines) == 2
        assert all("shutdown() was called" in line for line in lines)
