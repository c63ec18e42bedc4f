"""Running the tests in every process of a pod, as one test run.

Started by ``python -m freeio_jax.launch -n N -m pytest tests`` or under a cluster's own launcher.
Every process runs the same tests in the same order, with the same seed; process 0 reports, for all.
"""

from __future__ import annotations

import faulthandler
import fnmatch
import itertools
import json
import os
import pickle
import re
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax._src import array, distributed

from freeio_jax import cluster

HERE = Path(__file__).parent

#: Folders and files of tests that start programs of their own, or look at one process only.
NOT_ON_PODS = (
    "bench",
    "cuda/test_emulated*.py",
    "cuda/test_gpu_processes.py",
    "cuda/test_over_tcp.py",
    "examples",
    "launch",
    "overlap/test_gpu_programs.py",
    "pod",
    "test_bootstrap.py",
    "test_docs.py",
)

#: Seconds to wait for another process to end the test that has ended here.
PATIENCE_SECONDS = 240


def is_pod() -> bool:
    """Whether JAX's own cluster detection finds that this is one of several processes."""
    return cluster.num_processes() > 1


def is_left_out(path: Path) -> bool:
    """Whether a pod does not collect the tests in this file or folder."""
    if not path.is_relative_to(HERE):
        return False
    name = path.relative_to(HERE).as_posix()
    return any(fnmatch.fnmatch(f"{name}/", f"{pattern}/*") for pattern in NOT_ON_PODS)


def fetch_whole_arrays() -> None:
    """Lets every process look at all of an array: what it lacks comes from the others.

    Tests compare whole results with an oracle. Looking at one is a call that all processes make, as
    they run the same test. Its bytes go by JAX's coordinator, so tests of our exchanges need no
    collective of XLA's, and no program for each shape.
    """
    local = array.ArrayImpl._value
    number = itertools.count()

    def value(self):
        if self.is_fully_addressable or self.is_fully_replicated or self._npy_value is not None:
            return local.fget(self)
        shards = [s for s in self.addressable_shards if s.replica_id == 0]
        parts = gather(next(number), [(s.index, np.asarray(s.data)) for s in shards])
        whole = np.empty(self.shape, self.dtype)
        for index, part in itertools.chain.from_iterable(parts):
            whole[index] = part
        whole.flags.writeable = False
        self._npy_value = whole
        return whole

    array.ArrayImpl._value = property(value)


def gather(number: int, mine: object) -> list:
    """What each process gives in this call, the ``number``-th one, in order of process."""
    client, here = distributed.global_state.client, jax.process_index()
    client.key_value_set_bytes(f"pytest/array/{number}/{here}", pickle.dumps(mine))
    patience = PATIENCE_SECONDS * 1000
    all_of_them = [
        mine
        if process == here
        else pickle.loads(
            client.blocking_key_value_get_bytes(f"pytest/array/{number}/{process}", patience)
        )
        for process in range(jax.process_count())
    ]
    # All have read the one before, or they would not have come to this one.
    if number > 0:
        client.key_value_delete(f"pytest/array/{number - 1}/{here}")
    return all_of_them


class PodPlugin:
    """One report for all processes."""

    def __init__(self, config):
        self._client = distributed.global_state.client
        self._process = jax.process_index()
        self._others = [p for p in range(jax.process_count()) if p != self._process]
        self._phases = 0  # setups, calls and teardowns so far
        self._share_seed(config)
        if self._process != 0:
            reporter = config.pluginmanager.get_plugin("terminalreporter")
            reporter._tw._file = open(os.devnull, "w")  # noqa: SIM115, as long as the run

    def _share_seed(self, config):
        if self._process == 0:
            self._client.key_value_set("pytest/seed", str(config.option.seed))
        config.option.seed = int(self._client.blocking_key_value_get("pytest/seed", 60_000))

    def _publish(self, key, value):
        self._client.key_value_set(f"pytest/{key}", json.dumps(value))

    def _read(self, key):
        """Waits for it; raises RuntimeError if it does not come."""
        key, patience = f"pytest/{key}", PATIENCE_SECONDS * 1000
        return json.loads(self._client.blocking_key_value_get(key, patience))

    def _agree(self, key, trouble):
        """What process 0 says of ``trouble`` that it found, in all processes."""
        if self._process == 0:
            self._publish(f"{key}/verdict", trouble)
            return trouble
        return self._read(f"{key}/verdict")

    def pytest_collection_finish(self, session):
        """Ends the run where the processes have not selected the same tests in the same order."""
        here, trouble = [item.nodeid for item in session.items], []
        self._publish(f"selected/{self._process}", here)
        for process in self._others if self._process == 0 else ():
            there = self._read(f"selected/{process}")
            if there != here:
                pairs = itertools.zip_longest(here, there, fillvalue="none")
                number, (mine, its) = next(x for x in enumerate(pairs, 1) if x[1][0] != x[1][1])
                trouble.append(
                    f"test {number} of process 0 is {mine}, that of process {process} is {its}"
                )
        if trouble := self._agree("selected", trouble):
            pytest.exit("the processes have selected different tests: " + "; ".join(trouble), 2)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item, call):
        """Each phase of a test ends in the same way in all processes: badly, if it did in one."""
        report = yield
        self._phases += 1
        here = [report.when, report.outcome, f"{report.longreprtext}\n{report.capstderr}"]
        trouble = self._agree(f"phase/{self._phases}", self._gather(here))
        if trouble:
            report.outcome = "failed"
            report.longrepr = trouble
        return report

    def _gather(self, here):
        """What to say, in process 0, of a phase that failed anywhere or ended in different ways."""
        key = f"phase/{self._phases}"
        if self._process != 0:
            self._publish(f"{key}/{self._process}", here)
            return None
        ends = {0: here}
        for process in self._others:
            try:
                ends[process] = self._read(f"{key}/{process}")
            except RuntimeError as error:
                ends[process] = ["nothing", "failed", f"it did not end this test: {error}"]
        if self._phases > 1:
            # All have read it, or they would not have come to this one.
            self._client.key_value_delete(f"pytest/phase/{self._phases - 1}")
        if all(end[1] != "failed" and end[:2] == here[:2] for end in ends.values()):
            return None
        said = {}
        for process, (when, outcome, text) in ends.items():
            text = re.sub(r"0x[0-9a-fA-F]+", "0x...", text)  # addresses differ, errors need not
            said.setdefault((when, outcome, text), []).append(str(process))
        return "\n".join(
            f"process {', '.join(processes)}: {when} {outcome}"
            + f"\n{text}" * (outcome != "passed")
            for (when, outcome, text), processes in said.items()
        )

    # pytest-timeout's own hooks, to show the stacks of every process, not of process 0 alone.

    @pytest.hookimpl(optionalhook=True)
    def pytest_timeout_set_timer(self, item, settings):
        self._timer = threading.Timer(settings.timeout, self._end_hanging, [item, settings.timeout])
        self._timer.daemon = True
        self._timer.start()
        return True

    @pytest.hookimpl(optionalhook=True)
    def pytest_timeout_cancel_timer(self, item):
        self._timer.cancel()
        return True

    def _end_hanging(self, item, seconds):
        item.config.pluginmanager.getplugin("capturemanager").suspend_global_capture()
        sys.__stderr__.write(
            f"process {self._process} (pid {os.getpid()}) ran {item.nodeid} for {seconds:g} s:\n"
        )
        sys.__stderr__.flush()
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        time.sleep(1)  # the others show where they are, and are not ended before they have
        os._exit(1)


def join(config) -> None:
    """Called once, before tests are collected, in each process of a pod."""
    import freeio_jax as fio

    jax.distributed.initialize()
    fio.initialize()
    if jax.process_count() > 1:
        fetch_whole_arrays()
        config.pluginmanager.register(PodPlugin(config), "pod")
