"""Running the tests in every process of a pod, as one test run.

Started by ``python -m freeio_jax.launch -n N -m pytest tests`` or under a cluster's own launcher.
Every process runs the same tests in the same order, with the same seed; process 0 reports, for all.
"""

from __future__ import annotations

import json
import os

import jax
import numpy as np
import pytest
from jax._src import array, clusters, distributed
from jax.experimental import multihost_utils

#: Files whose tests start pods themselves, or look at one process only.
NOT_ON_PODS = {"test_bootstrap.py", "test_faults.py", "test_launch.py", "test_processes.py"}

#: Seconds to wait for another process to end the test that has ended here.
PATIENCE_SECONDS = 240


def is_pod() -> bool:
    """Whether JAX's own cluster detection finds that this is one of several processes."""
    return any(
        not env.opt_in_only_method and env.is_env_present()
        for env in clusters.ClusterEnv._cluster_types
    )


def fetch_whole_arrays() -> None:
    """Lets every process look at all of an array: what it lacks comes from the others.

    Tests compare whole results with an oracle. Looking at one is a collective call then, which all
    processes make, as they run the same test.
    """
    local = array.ArrayImpl._value

    def value(self):
        if self.is_fully_addressable or self.is_fully_replicated:
            return local.fget(self)
        return np.asarray(multihost_utils.process_allgather(self, tiled=True))

    array.ArrayImpl._value = property(value)


class PodPlugin:
    """One report for all processes."""

    def __init__(self, config):
        self._client = distributed.global_state.client
        self._process = jax.process_index()
        self._others = [p for p in range(jax.process_count()) if p != self._process]
        self._tests = 0
        self._here: list[str] = []  # what went wrong in this test so far
        self._share_seed(config)
        if self._process != 0:
            reporter = config.pluginmanager.get_plugin("terminalreporter")
            reporter._tw._file = open(os.devnull, "w")  # noqa: SIM115, as long as the run

    def _share_seed(self, config):
        if self._process == 0:
            self._client.key_value_set("pytest/seed", str(config.option.seed))
        config.option.seed = int(self._client.blocking_key_value_get("pytest/seed", 60_000))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.failed:
            self._here.append(f"{report.when}:\n{report.longreprtext}\n{report.capstderr}")
        if report.when == "teardown":
            self._gather(report)
        return report

    def _gather(self, report):
        """Adds to process 0's last report of a test what went wrong elsewhere."""
        self._tests += 1
        key, here = f"pytest/test/{self._tests}", self._here
        self._here = []
        if self._process != 0:
            self._client.key_value_set(f"{key}/{self._process}", json.dumps([report.nodeid, here]))
            return
        trouble = []
        for process in self._others:
            try:
                text = self._client.blocking_key_value_get(
                    f"{key}/{process}", PATIENCE_SECONDS * 1000
                )
            except RuntimeError as error:
                trouble.append(f"process {process} did not end this test: {error}")
                continue
            self._client.key_value_delete(f"{key}/{process}")
            nodeid, failures = json.loads(text)
            if nodeid != report.nodeid:
                trouble.append(f"process {process} runs another test: {nodeid}")
            trouble += [f"process {process}, {failure}" for failure in failures]
        if trouble:
            report.outcome = "failed"
            report.longrepr = "\n".join(trouble)


def join(config) -> None:
    """Called once, before tests are collected, in each process of a pod."""
    import freeio_jax as fio

    jax.distributed.initialize()
    fio.initialize()
    if jax.process_count() > 1:
        fetch_whole_arrays()
        config.pluginmanager.register(PodPlugin(config), "pod")
