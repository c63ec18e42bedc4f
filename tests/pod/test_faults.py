"""What goes wrong between processes ends in an error that names the culprit, in real processes."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from freeio_jax.launch import Pod

PROGRAM = Path(__file__).with_name("fault_program.py")
TIMEOUT = 3.0
#: Seconds that a crowded machine may add until an error is told.
CROWDED = 60.0


class Run:
    """One pod with a fault in process 1, and what its processes said."""

    def __init__(self, fault, processes=2, on_line=None, arguments=(), hosts=1):
        self.woken = False
        self.lines = [[] for _ in range(processes)]
        self.moments = {}  # of the fault, and of the first error
        self._on_line = on_line
        self.pod = Pod(
            [str(PROGRAM), fault, *arguments],
            num_processes=processes,
            num_hosts=hosts,
            grace=3 * TIMEOUT + CROWDED,
            output=self._take,
        )
        self.status = self.pod.run()
        if {"FAULT", "ERROR"} <= set(self.moments):
            # Shown by pytest -rP: the table of docs/processes.md.
            print(f"{' '.join([fault, *arguments])}: {self.seconds():.2f} s")

    def _take(self, rank, _stream, line):
        self.lines[rank].append(line)
        for word in ("FAULT", "ERROR"):
            if f" {word}" in line and (word == "FAULT" or rank != 1):
                self.moments.setdefault(word, time.monotonic())
        if self._on_line is not None:
            self._on_line(self, line)

    def seconds(self):
        """From the fault to the first error in another process."""
        return self.moments["ERROR"] - self.moments["FAULT"]

    def pid(self, rank):
        return self.pod.processes[rank].pid

    def error(self, rank):
        """The message of the exception that process ``rank`` got."""
        for line in self.lines[rank]:
            if " ERROR " in line:
                return line.split(" ERROR ", 1)[1]
        raise AssertionError(f"process {rank} got no error:\n" + "\n".join(self.lines[rank]))


def names_process_1(run, message):
    return f"process 1 (pid {run.pid(1)})" in message.replace("Process", "process")


@pytest.mark.parametrize(
    "fault, processes", [("killed before", 2), ("killed between", 2), ("killed inside", 3)]
)
def test_a_killed_process_is_noticed_at_once(fault, processes):
    run = Run(fault, processes)
    message = run.error(0)
    assert names_process_1(run, message) and "ended" in message, message
    assert "freeio_jax.dispatch" in message or "freeio_jax.combine" in message, message
    assert run.seconds() < TIMEOUT + CROWDED
    assert run.status == 128 + signal.SIGKILL


@pytest.mark.parametrize("moment", ["0.01", "0.05", "0.1", "0.3"])
def test_a_process_killed_at_some_time_is_named(moment):
    """Wherever it was: between messages, while its rows were read, in its own code."""
    run = Run("killed at some time", 3, arguments=[moment])
    for rank in (0, 2):
        message = run.error(rank)
        assert names_process_1(run, message) and "ended" in message, message
        assert "freeio_jax.dispatch: " in message or "freeio_jax.combine: " in message, message
    assert run.seconds() < TIMEOUT + CROWDED


def test_the_next_job_starts_clean():
    before = set(os.listdir("/dev/shm"))
    crashed = Run("killed at some time", arguments=["0.2"])
    assert all(process.poll() is not None for process in crashed.pod.processes)
    assert not [name for name in set(os.listdir("/dev/shm")) - before if "freeio" in name]
    assert Run("none").status == 0


@pytest.mark.parametrize("fault", ["killed before it connects", "killed when connected"])
def test_a_process_killed_inside_initialize(fault):
    run = Run(fault, 3)
    for rank in (0, 2):
        message = run.error(rank)
        assert f"freeio_jax.initialize: process 1 (pid {run.pid(1)}) ended while" in message
    assert run.seconds() < TIMEOUT + CROWDED


def test_a_process_killed_before_initialize():
    run = Run("killed before initialize", 3)
    for rank in (0, 2):
        assert "not all 3 processes came within 3 s, which leaves process(es) [1]" in run.error(
            rank
        )
    assert run.seconds() < TIMEOUT + CROWDED


@pytest.mark.parametrize("fault", ["garbage", "garbage on a channel"])
def test_garbage_instead_of_a_message(fault):
    run = Run(fault)
    message = run.error(0)
    assert names_process_1(run, message) and "no message of this engine" in message, message
    assert "freeio_jax.dispatch" in message or "freeio_jax.combine" in message, message
    run.error(1)


def test_a_stopped_process_is_named_after_the_time_out():
    def wake(run, line):
        # Once the others have given up, it goes on, and must not believe what it reads.
        if " ERROR " in line and not run.woken:
            run.woken = True
            os.kill(run.pid(1), signal.SIGCONT)

    run = Run("stopped past", on_line=wake)
    message = run.error(0)
    assert names_process_1(run, message) and "waited 3 s" in message, message
    assert run.seconds() < TIMEOUT + CROWDED
    assert "rank 1 (mesh device 1)" in message, message
    run.error(1)


def test_a_process_that_goes_on_within_the_time_out_does_no_harm():
    def wake(run, line):
        if " FAULT " in line:
            threading.Timer(1.0, os.kill, (int(line.split()[2]), signal.SIGCONT)).start()

    run = Run("stopped within", on_line=wake)
    assert run.status == 0, run.lines
    assert all("FINISHED" in "".join(lines) for lines in run.lines)


OTHER_PROGRAMS = {
    "other shape": ("num_tokens=4", "num_tokens=6"),
    "other dtype": ("rows: F32[5]", "rows: F16[5]"),
    "other dtype as wide": ("rows: BF16[5]", "rows: F16[5]"),
    "other capacity": ("capacity=8", "capacity=12"),
    "other program": ("rows: F32[5]", "rows: F32[7]"),
}


def test_another_program_is_told_by_its_call():
    """In one pod: after each error the processes go on with the next programs."""
    run = Run("other programs", arguments=OTHER_PROGRAMS)
    assert run.status == 0, run.lines
    for name, (here, there) in OTHER_PROGRAMS.items():
        ours, theirs = (
            next(line for line in lines if f" {name} AFTER " in line) for lines in run.lines
        )
        assert names_process_1(run, ours), ours
        assert here in ours and there in ours, ours
        # The culprit learns it as well.
        assert f"rocess 0 (pid {run.pid(0)})" in theirs, theirs
        seconds = float(ours.split(" AFTER ")[1].split()[0])
        print(f"{name}: {seconds:.2f} s")  # for the table of docs/processes.md
        assert seconds < TIMEOUT + CROWDED


def test_fewer_calls():
    run = Run("fewer calls")
    message = run.error(0)
    assert "process 1" in message.lower() and f"(pid {run.pid(1)})" in message, message
    assert "waits in no exchange" in message, message


@pytest.mark.parametrize("fault", ["raises", "shut down"])
def test_a_process_that_leaves_is_noticed_at_once(fault):
    run = Run(fault)
    message = run.error(0)
    assert names_process_1(run, message) and "left" in message, message
    assert run.seconds() < TIMEOUT + CROWDED
    if fault == "raises":
        assert any("lost the plot" in line for line in run.lines[1])


def test_forgetting_initialize():
    run = Run("not initialized")
    for rank in range(2):
        assert re.search(r"has 2 processes. Call freeio_jax.initialize\(\)", run.error(rank))


def test_two_jobs_at_once_do_not_meet():
    runs = []
    threads = [threading.Thread(target=lambda: runs.append(Run("none"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [run.status for run in runs] == [0, 0], [run.lines for run in runs]
