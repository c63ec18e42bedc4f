"""What initialize() makes of NVSHMEM, in two processes as two virtual hosts, with a stand-in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from freeio_jax.launch import Pod

PROGRAM = Path(__file__).with_name("nvshmem_program.py")

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def run(monkeypatch):
    """Runs a scenario; (what each process said, the pod, its status)."""

    def run(scenario, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        lines = [[], []]
        pod = Pod(
            [str(PROGRAM), scenario],
            num_processes=2,
            num_hosts=2,
            output=lambda rank, _stream, line: lines[rank].append(line),
        )
        status = pod.run()
        return ["\n".join(text) for text in lines], pod, status

    return run


def test_is_started_once_and_joined_after_each_initialize(run):
    said, _, status = run("works")
    for process, text in enumerate(said):
        described = (
            "NVSHMEM 3.4.5 (nvshmem4py 0.4.1), network to process(es) "
            f"{1 - process}; 402653184 bytes of symmetric memory"
        )
        assert f"CARRIER NVSHMEM: {described}" in text, said
        assert f"AGAIN {described}" in text, said
        assert text.count("LEFT") == 2, said
        assert text.count("FINALIZED") == 1, said
        assert text.index("FINALIZED") > text.rindex("LEFT"), said
    assert status == 0, said


@pytest.mark.parametrize("scenario", ["end_hangs", "end_fails", "child"])
def test_its_end_is_tried_once_and_bounded(run, scenario):
    said, _, status = run(scenario, FREEIO_TIMEOUT="3")
    assert all(text.count("FINALIZED") == 1 for text in said), said
    assert ("NVSHMEM has not ended within 3 s" in said[1]) == (scenario == "end_hangs"), said
    assert ("NVSHMEM has not ended in order: a plugin is gone" in said[1]) == (
        scenario == "end_fails"
    ), said
    assert status == 0, said


@pytest.mark.parametrize("scenario", ["by_link", "failure", "loss", "jax_shutdown"])
def test_it_is_not_ended(run, scenario):
    """It has no thread for a network, or some process does not end in order."""
    said, _, status = run(scenario)
    assert not any("FINALIZED" in text for text in said), said
    assert status == 0, said
    # Nobody waits for as long as for a process that is late, which is a minute.
    ends = re.findall(r"ENDED in (\S+) s", "\n".join(said))
    assert len(ends) == 2, said
    assert max(map(float, ends)) < 30


@pytest.mark.parametrize(
    ("scenario", "why"),
    [
        ("not_installed", r"nvshmem4py cannot be loaded \(ModuleNotFoundError: .*\): pip install"),
        ("not_built", "freeio_jax was built without NVSHMEM: pip install nvidia-nvshmem-cu13"),
        ("several_gpus", "has 2 GPUs"),
    ],
)
def test_xlas_collectives_serve_where_a_process_cannot_start_it(run, scenario, why):
    said, pod, _ = run(scenario)
    pid = pod.processes[1].pid
    for text in said:
        where = rf"process 1 \(pid {pid}\) on host 1 \(\S+\)"
        assert re.search(rf"CARRIER XLA's collectives: .*{where}:? {why}", text), said


@pytest.mark.parametrize("scenario", ["not_built", "several_gpus"])
def test_it_may_be_asked_for(run, scenario):
    said, *_ = run(scenario, FREEIO_TRANSPORT="nvshmem")
    for text in said:
        assert re.search(r"ERROR after .*transport=nvshmem \(FREEIO_TRANSPORT\) asks for", text), (
            said
        )


def test_it_may_be_declined(run):
    said, *_ = run("works_not", FREEIO_TRANSPORT="xla")
    for text in said:
        assert "CARRIER XLA's collectives: process 0" in text, said
        assert "transport=xla (FREEIO_TRANSPORT) says so" in text, said


def test_versions_that_differ(run):
    said, *_ = run("other_version")
    for text in said:
        assert re.search(
            r"ERROR .*process 0 \(pid \d+\) on host 0 \(\S+\) has NVSHMEM 3.4.5 .*process 1 "
            r"\(pid \d+\) on host 1 \(\S+\) has NVSHMEM 3.5.21",
            text,
        ), said


def test_a_process_where_it_does_not_start_is_named(run):
    said, *_ = run("fails")
    for text in said:
        found = re.search(
            r"ERROR after (\S+) s: .*process 1 \(pid \d+\) on host 1 \(\S+\) could not start "
            "NVSHMEM: RuntimeError: no network interface",
            text,
        )
        assert found, said
        assert float(found[1]) < 30


def test_a_process_where_starting_hangs_is_named(run):
    said, *_ = run("hangs", FREEIO_TIMEOUT="5")
    for text in said:
        assert re.search(
            r"ERROR after .*process 1 \(pid \d+\) on host 1 \(\S+\) did not start NVSHMEM within "
            "5 s",
            text,
        ), said
