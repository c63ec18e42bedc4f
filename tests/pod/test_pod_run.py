"""The tests on a pod: one run, one report, whichever process fails. See ../pod_run.py."""

import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

EVERYWHERE = """
    import os
    import jax, numpy as np, pytest
    from jax.experimental import multihost_utils
    me = int(os.environ.get("JAX_PROCESS_ID", os.environ.get("SLURM_PROCID", 0)))

    def test_all_are_there(rng):
        assert jax.process_index() == me and jax.process_count() == 2
        drawn = multihost_utils.process_allgather(rng.integers(2**30))
        assert drawn[0] == drawn[1]

    def test_skips():
        pytest.skip("no reason")
    """


@pytest.fixture
def tests(tmp_path):
    """A function that makes a folder of tests like this one, with the given sources in it."""

    def make(*sources):
        for name in ("conftest.py", "pod_run.py"):
            shutil.copy(TESTS / name, tmp_path)
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        (tmp_path / "test_it.py").write_text("\n".join(map(textwrap.dedent, sources)))
        return [*("-m", "pytest", "-p", "no:cacheprovider", str(tmp_path / "test_it.py"))]

    return make


def launch(arguments, *options):
    return subprocess.run(
        [sys.executable, "-m", "freeio_jax.launch", "-n", "2", *options, *arguments],
        capture_output=True,
        text=True,
        timeout=170,
    )


def test_one_report(tests):
    done = launch(tests(EVERYWHERE))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 1 skipped" in done.stdout
    assert not re.search(r"^\[1\]", done.stdout, re.MULTILINE), done.stdout


def test_a_failure_in_any_process_is_one_and_says_where(tests):
    fails = """
        def test_fails_in_one():
            print("look here")
            assert me == 0, "not me"
        def test_goes_on():
            pass
        """
    done = launch(tests(EVERYWHERE, fails))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 passed, 1 failed" in done.stdout.replace("1 failed, 2 passed", "2 passed, 1 failed")
    assert re.search(r"^\[0\] process 1: call failed", done.stdout, re.MULTILINE), done.stdout
    assert "AssertionError: not me" in done.stdout
    # All stop at the same test when told to stop.
    done = launch([*tests(EVERYWHERE, fails), "-x"])
    assert "1 failed" in done.stdout and "2 passed" not in done.stdout, done.stdout


def test_a_skip_in_one_process_alone_is_a_failure(tests):
    skips = """
        def test_skips_in_one():
            if me == 1:
                pytest.skip("alone")
        """
    done = launch(tests(EVERYWHERE, skips))
    assert done.returncode == 1
    assert "process 0: call passed" in done.stdout and "process 1: call skipped" in done.stdout


def test_other_tests_in_another_process_end_the_run(tests):
    more = """
        if me == 1:
            def test_more():
                pass
        """
    done = launch(tests(EVERYWHERE, more))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "test 3 of process 0 is none, that of process 1 is test_it.py::test_more" in (
        done.stdout + done.stderr
    )


def test_a_hang_shows_every_process(tests):
    hangs = """
        import threading
        @pytest.mark.timeout(3, method="thread")
        def test_hangs_in_one():
            if me == 1:
                threading.Event().wait()
        """
    done = launch(tests(EVERYWHERE, hangs), "--grace=1")
    assert done.returncode != 0
    for rank, where in ((0, r"pod_run.py.* in _read"), (1, r"test_it.py.* in test_hangs_in_one")):
        assert f"[{rank}] process {rank} (pid " in done.stderr, done.stderr
        assert re.search(rf"\[{rank}\] .*{where}", done.stderr), done.stderr


def test_under_slurm(tests):
    """As srun starts it: two tasks that find each other by what Slurm has told them."""
    arguments = tests(EVERYWHERE, "def test_fails_in_one(): assert me == 0, 'not me'")
    with socket.socket() as reserved:
        # JAX takes the coordinator's port from the number of the job.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        for job in range(4096):
            try:
                reserved.bind(("127.0.0.1", job + 65536 - 4096))
                break
            except OSError:
                continue
        tasks = [
            subprocess.Popen(
                [sys.executable, *arguments],
                env=os.environ
                | {
                    "SLURM_JOB_ID": str(job),
                    "SLURM_STEP_NODELIST": "127.0.0.1",
                    "SLURM_NTASKS": "2",
                    "SLURM_PROCID": str(task),
                    "SLURM_LOCALID": str(task),
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for task in range(2)
        ]
        said = [task.communicate(timeout=170)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [1, 1], said
    assert "1 failed, 1 passed, 1 skipped" in said[0] and "process 1: call failed" in said[0], said[
        0
    ]
    assert "passed" not in said[1], said[1]
