"""Groups of processes on several hosts: virtual ones, and real ones in network namespaces."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import network
import pytest
from test_faults import CROWDED, OTHER_PROGRAMS, PROGRAM, TIMEOUT, Run
from test_recovery import PROGRAMS, said
from test_recovery import run as run_program

from freeio_jax.launch import Pod

REAL = pytest.mark.skipif(network.why_not() is not None, reason=str(network.why_not()))
TESTS = Path(__file__).parents[1]


def names_process(run, rank, message):
    """Whether an error names a process of another host, with the host."""
    text = message.replace("Process", "process")
    return re.search(rf"process {rank} \(pid {run.pid(rank)}\) on host \d+ \(\S+\)", text)


class RealRun(network.Pod):
    """A program of test_faults on two real hosts, with a fault in process 1."""

    def __init__(self, net, fault, *arguments, on_line=None, processes_per_host=1):
        self.moments = {}
        self._then = on_line
        super().__init__(
            net,
            [PROGRAM, fault, *arguments],
            processes_per_host=processes_per_host,
            on_line=self._note,
        )

    @staticmethod
    def _note(self, rank, line):
        for word in ("FAULT", "ERROR"):
            if f" {word}" in line and (word == "FAULT" or rank != 1):
                self.moments.setdefault(word, time.monotonic())
        if self._then is not None:
            self._then(self, rank, line)

    def seconds(self):
        return self.moments["ERROR"] - self.moments["FAULT"]

    error = Run.error


@pytest.fixture
def net():
    with network.Network(2) as made:
        yield made


@pytest.mark.parametrize(
    "fault, processes", [("killed before", 2), ("killed between", 2), ("killed inside", 4)]
)
def test_a_killed_process_is_noticed_at_once(fault, processes):
    run = Run(fault, processes, hosts=2)
    for rank in range(processes):
        if rank == 1 or (fault == "killed inside" and rank == 2):  # this one sleeps
            continue
        message = run.error(rank)
        assert re.search(rf"process 1 \(pid {run.pid(1)}\)", message), message
        # Of four, process 0 shares the host of process 1. It may see the end first, and tell the
        # others in the words of one host.
        if processes != 4 or ", ended while process 0" not in message:
            assert "on host" in message and "cannot be reached any more" in message, message
            assert "must call freeio_jax.shutdown() and then freeio_jax.initialize()" in message
        assert "freeio_jax.dispatch" in message or "freeio_jax.combine" in message, message
        # Also in the log, for an error of XLA's collectives that names nobody.
        told = [line for line in run.lines[rank] if line.startswith("freeio_jax: ")]
        if fault != "killed inside" or rank == 3:
            assert any(names_process(run, 1, x) and "cannot be reached" in x for x in told), told
    assert run.seconds() < TIMEOUT + CROWDED
    assert run.status == 128 + signal.SIGKILL


def test_a_stopped_process_is_named_after_the_time_out():
    def wake(run, line):
        if " ERROR " in line and not run.woken:
            run.woken = True
            os.kill(run.pid(1), signal.SIGCONT)

    run = Run("stopped past", on_line=wake, hosts=2)
    message = run.error(0)
    assert names_process(run, 1, message) and "waited 3 s" in message, message
    assert "rank 1 (mesh device 1)" in message, message
    assert run.seconds() < TIMEOUT + CROWDED
    run.error(1)


def test_a_process_that_goes_on_within_the_time_out_does_no_harm():
    def wake(run, line):
        if " FAULT " in line:
            threading.Timer(1.0, os.kill, (int(line.split()[2]), signal.SIGCONT)).start()

    run = Run("stopped within", on_line=wake, hosts=2)
    assert run.status == 0, run.lines


def test_no_process_gives_up_alone():
    """Process 1 hears after its time-out that process 0 is ready, which is in the collective then.

    If process 1 gave up, process 0 would wait there, and nothing would end that.
    """
    run = Run("done comes late", hosts=2)
    assert run.status == 0, run.lines
    assert any(" FAULT" in line for line in run.lines[1]), run.lines
    told = [line for line in run.lines[1] if "has waited 3 s" in line]
    assert any("does not give up" in x and "gives up after" not in x for x in told), run.lines


def test_another_program_is_told_by_its_call():
    """After each error the processes go on: XLA's collectives had not begun."""
    run = Run("other programs", arguments=OTHER_PROGRAMS, hosts=2)
    assert run.status == 0, run.lines
    for name, texts in OTHER_PROGRAMS.items():
        ours, theirs = (
            next(line for line in lines if f" {name} AFTER " in line) for lines in run.lines
        )
        for text in texts:
            # What follows is lowered by JAX, so its dtypes have JAX's names.
            names = (("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32"))
            for short, long in names:
                text = re.sub(rf"\b{short}\b", long, text)
            assert text in ours and text in theirs, (text, ours, theirs)
        assert "on host" in ours, ours
        assert float(ours.split(" AFTER ")[1].split()[0]) < TIMEOUT + CROWDED


def test_processes_connect_again_as_the_error_says():
    run = Run("connection lost", hosts=2)
    assert run.status == 0, run.lines
    for rank, lines in enumerate(run.lines):
        (message,) = (line for line in lines if " LOST " in line)
        assert names_process(run, 1 - rank, message), message
        assert "call freeio_jax.shutdown() and then freeio_jax.initialize()" in message, message


@pytest.mark.parametrize("fault", ["raises", "shut down", "fewer calls"])
def test_a_process_that_does_not_come_is_named(fault):
    run = Run(fault, hosts=2)
    message = run.error(0)
    assert names_process(run, 1, message), message
    assert ("waits in no exchange" if fault == "fewer calls" else "left") in message, message
    assert run.seconds() < TIMEOUT + CROWDED


def test_sizes_of_hosts_that_differ(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import jax, freeio_jax as fio\n"
        "jax.distributed.initialize()\n"
        "fio.config(host_size=1 + jax.process_index())\n"
        "try:\n    fio.initialize()\nexcept RuntimeError as error:\n    print(error)\n"
    )
    lines = []
    Pod([str(program)], num_processes=2, output=lambda *line: lines.append(line)).run()
    told = [line for _, _, line in lines if "the setting host_size is 1 in process 0" in line]
    assert len(told) == 2 and all("and 2 in process 1" in line for line in told), lines


def test_a_program_that_was_lowered_for_one_host(tmp_path):
    """And groups within a host beside those across: each goes its own way."""
    status, lines = run_program(
        tmp_path,
        """
        from freeio_jax import hosts
        fio.config(timeout=600)
        within = Mesh(np.array(jax.devices()).reshape(2, 2), ("host", "expert"))
        spec = P(("host", "expert"))
        def local(x, i):
            i = 0 * i + jnp.arange(2, dtype=i.dtype)
            out = fio.dispatch(x, i, num_experts=2, axis_name="expert")
            return fio.combine(out.tokens, out.handle) / 2
        local = jax.jit(jax.shard_map(local, mesh=within, in_specs=spec, out_specs=spec))
        text = local.lower(tokens, topk_idx).as_text()
        assert "freeio_dispatch" in text and "freeio_meet" not in text
        step = program(exchange)
        for _ in range(2):
            assert right(local(tokens, topk_idx)) and right(step(tokens, topk_idx))

        spans, hosts.of_groups = hosts.of_groups, lambda *_: None
        def step(x, i):
            return exchange(x, i)
        saved = program(step).lower(tokens, topk_idx).compile()
        hosts.of_groups = spans
        barrier("compiled")
        fio.config(timeout=3)
        say("error", error_of(saved))
        """,
        processes=4,
        num_hosts=2,
    )
    assert status == 0, "\n".join(lines[0])
    for (message,) in said(lines, "error"):
        assert "are on other hosts, and this program was compiled for ranks on one host" in message


def test_forms_of_programs(tmp_path):
    """Also exchanges that nothing orders, which XLA runs at once."""
    steps = "for _ in range(5):\n    assert right(step(tokens, topk_idx))\n"
    forms = "\n".join(f"say({form!r})\n{code}\n{steps}" for form, code in PROGRAMS.items())
    status, lines = run_program(tmp_path, forms, processes=4, num_hosts=2)
    assert status == 0, "\n".join(lines[0])


# --- Real hosts ----------------------------------------------------------------------------------


@REAL
def test_the_contract_between_real_hosts(net):
    pod = network.Pod(
        net,
        [
            *("-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS / "test_collective.py"),
            *("-k", "pytree"),  # `.ci/run` runs all of them, with one process on each host
        ],
        processes_per_host=2,
    )
    assert pod.run(170) == [0] * 4, "\n".join(pod.lines[0])
    assert re.search(r"\d+ passed", pod.lines[0][-1]), pod.lines[0]


@REAL
@pytest.mark.parametrize("fault", ["killed between", "stopped past"])
def test_a_fault_on_a_real_host(fault, net):
    def wake(run, _rank, line):
        if " ERROR " in line and fault == "stopped past":
            os.kill(run.pid(1), signal.SIGCONT)

    run = RealRun(net, fault, on_line=wake)
    run.run(60)
    message = run.error(0)
    assert names_process(run, 1, message), message
    print(f"{fault}, real hosts: {run.seconds():.2f} s")
    assert run.seconds() < TIMEOUT + CROWDED


@REAL
def test_a_link_that_goes_away(net):
    """Nobody is told. So the ranks on both sides get an error at the time-out."""
    wait = threading.Lock()

    def cut(_run, _rank, line):
        if "FAULT" in line and wait.acquire(blocking=False):
            net.cut(1)

    run = RealRun(net, "link cut", on_line=cut)
    run.run(60)
    for rank, other in ((0, 1), (1, 0)):
        message = run.error(rank)
        assert names_process(run, other, message) and "waited 3 s" in message, message
