"""What freeio_jax.info says, as a function and on the command line."""

import os
import re
import subprocess
import sys

import jax
import pytest

from freeio_jax.grouped_matmul import Product
from freeio_jax.info import info

PODS = pytest.mark.skipif(jax.process_count() > 1, reason="starts a pod of its own")


def test_names_versions_devices_engine_settings_and_the_grouped_matmul():
    told = info()
    assert f"jax {jax.__version__}" in told["versions"]
    assert told["devices"].startswith(f"{jax.device_count()} x ")
    assert "timeout=" in told["settings"]
    lines = told["grouped matmul"].splitlines()
    assert [line.split(": ")[0] for line in lines] == [product.value for product in Product]
    assert len(told["topology"].splitlines()) == jax.process_count()
    assert "mappings" in told["memory"]


def run(*options, program=("-m", "freeio_jax.info"), **environment):
    return subprocess.run(
        [sys.executable, *options, *program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_command_line():
    done = run(
        FREEIO_TIMEOUT="12.5",
        XLA_FLAGS="--xla_force_host_platform_device_count=3",
        JAX_PLATFORMS="cpu",
    )
    assert "timeout=12.5" in done.stdout, done.stderr
    assert "grouped matmul:" in done.stdout
    if jax.process_count() == 1:
        assert re.search(r"topology: +process 0: devices 0, 1, 2\n", done.stdout)
        assert re.search(r"problems: +none found\n", done.stdout)


@PODS
def test_one_device_is_a_problem_with_a_remedy():
    out = run(XLA_FLAGS="", JAX_PLATFORMS="cpu").stdout
    assert re.search(r"problems: +one CPU device.*xla_force_host_platform_device_count", out)


def test_unknown_variables_are_told_with_the_one_that_was_meant():
    done = run(FREEIO_TIMOUT="3")
    assert done.returncode != 0
    assert "unknown environment variable FREEIO_TIMOUT. Did you mean FREEIO_TIMEOUT?" in done.stderr


POD = ("-m", "freeio_jax.launch", "-n", "2", "--devices-per-process", "2", "--platform=cpu")


@PODS
def test_in_a_pod_process_0_tells_of_all():
    done = run(*POD)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith("[0] ") for line in lines), lines
    text = "\n".join(line[4:] for line in lines)
    assert "4 x cpu (cpu), 2 process(es)" in text
    assert re.search(r"process 0 \(pid \d+, this one\): devices 0, 1\n", text)
    assert re.search(r"process 1 \(pid \d+, host 0 \(\S+\)\): devices \d+, \d+\n", text)
    assert re.search(r"processes \[0, 1\] of host 0 \(\S+\): by process_vm_readv", text)
    assert "between hosts" not in text
    assert re.search(r"problems: +none found", text)


@PODS
def test_hosts_and_what_carries_rows_between_them():
    done = run(*POD, "--hosts", "2")
    assert done.returncode == 0, done.stderr
    assert re.search(r"process 1 \(pid \d+, host 1 \(\S+\)\): devices", done.stdout)
    assert "between hosts: XLA's collectives: on CPU there is nothing faster" in done.stdout
    assert "host_size=2 " in done.stdout


FORBIDDEN = """
from freeio_jax import _native, info
def forbid(*_args, **_kwargs):
    raise RuntimeError("freeio_jax.initialize: the kernel forbids it")
_native.join_pod = forbid
info._YAMA = __import__("pathlib").Path(__file__).with_name("scope")
info.main()
"""


@PODS
def test_in_a_pod_every_process_tells_what_is_wrong_with_it(tmp_path):
    (tmp_path / "scope").write_text("2\n")
    (tmp_path / "program.py").write_text(FORBIDDEN)
    done = run(*POD, program=(str(tmp_path / "program.py"),))
    assert done.returncode == 0, done.stderr
    for rank, start in ((0, "problems: "), (1, "process 1: problems: ")):
        (line,) = (x for x in done.stdout.splitlines() if x.startswith(f"[{rank}] {start}"))
        assert "RuntimeError: freeio_jax.initialize: the kernel forbids it" in line
    assert done.stdout.count("initialize() was not called, or failed") == 2
    assert done.stdout.count("`sysctl kernel.yama.ptrace_scope=1` allows them") == 2


@PODS
def test_a_pod_that_is_not_joined():
    program = "import jax, freeio_jax.info as i; print(i.info()['problems'])"
    done = run(
        "-c",
        program=(program,),
        JAX_NUM_PROCESSES="2",
        SLURM_JOB_ID="1",
        SLURM_NTASKS="2",
        SLURM_STEP_NODELIST="localhost",
        SLURM_PROCID="0",
        SLURM_LOCALID="0",
    )
    assert (
        "the launcher started 2 processes, but jax.distributed.initialize() was not" in done.stdout
    )


def test_without_flax_the_layers_say_what_to_install():
    program = (
        "import sys; sys.modules['flax'] = None\n"
        "import freeio_jax\n"
        "try: import freeio_jax.flax\n"
        "except ImportError as error: print(error)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert "pip install 'freeio_jax[flax]'" in out
