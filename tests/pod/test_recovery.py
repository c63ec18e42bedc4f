"""Programs of several processes after something ordinary has happened: one was late, or forked."""

import re
import signal
import textwrap

import jax
import pytest

from freeio_jax import runtime
from freeio_jax.launch import Pod

PRELUDE = """
import os, signal, sys, time
import jax, jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import distributed
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import freeio_jax as fio

jax.distributed.initialize()
fio.initialize()
me, ranks = jax.process_index(), jax.device_count()
mesh = Mesh(np.array(jax.devices()), ("expert",))
sharding = NamedSharding(mesh, P("expert"))

def whole(a):
    return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])

tokens = whole(np.arange(ranks * 4 * 3, dtype=np.float32).reshape(-1, 3) + 1)
topk_idx = whole(np.random.default_rng(0).permuted(
    np.tile(np.arange(ranks), (ranks * 4, 1)), axis=1)[:, :2].astype(np.int32))

def exchange(x, topk_idx):
    out = fio.dispatch(x, topk_idx, num_experts=ranks, axis_name="expert")
    return fio.combine(out.tokens, out.handle) / 2

def program(layer, **options):
    layer = jax.shard_map(layer, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), **options)
    return jax.jit(layer)

def right(y, scale=1.0):
    pairs = zip(y.addressable_shards, tokens.addressable_shards, strict=True)
    return all(np.allclose(a.data, scale * np.asarray(b.data)) for a, b in pairs)

def barrier(name):
    distributed.global_state.client.wait_at_barrier(name, 60_000)

def say(*words):
    print(*words, flush=True)

def error_of(run):
    try:
        jax.block_until_ready(run(tokens, topk_idx))
    except Exception as error:
        return " ".join(str(error).split())
    raise AssertionError("no error")
"""


def run(tmp_path, program, *arguments, processes=2, **options):
    """(status, lines of each process)"""
    script = tmp_path / "program.py"
    script.write_text(PRELUDE + textwrap.dedent(program))
    lines = [[] for _ in range(processes)]
    pod = Pod(
        [str(script), *map(str, arguments)],
        num_processes=processes,
        output=lambda rank, _, line: lines[rank].append(line),
        **options,
    )
    return pod.run(), lines


def said(lines, word):
    """What each process has said after ``word``."""
    text = [[line[len(word) :].strip() for line in one if line.startswith(word)] for one in lines]
    return text


PROGRAMS = {
    "one exchange": "step = program(exchange)",
    "a loop": """
step = program(lambda x, i: lax.scan(lambda x, _: (exchange(x, i), None), x, length=3)[0],
               check_vma=False)
""",
    "independent exchanges": """
part = jax.jit(exchange)
step = program(lambda x, i: (part(x, i) + part(2 * x, i) + part(3 * x, i)) / 6)
""",
    "groups of several kinds": """
mesh = Mesh(np.array(jax.devices()).reshape(2, -1), ("data", "model"))
sharding = NamedSharding(mesh, P(("data", "model")))
def layer(x, i):
    out = fio.dispatch(x, 0 * i + jnp.arange(2, dtype=i.dtype), num_experts=2, axis_name="data")
    x = fio.combine(out.tokens, out.handle) / 2
    out = fio.dispatch(x, i, num_experts=ranks, axis_name=("data", "model"))
    return fio.combine(out.tokens, out.handle) / 2
step = jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=P(("data", "model")),
                             out_specs=P(("data", "model"))))
tokens, topk_idx = (whole(np.concatenate([s.data for s in a.addressable_shards] * (2 * ranks))[
    :len(a)]) for a in (tokens, topk_idx))
""",
}


@pytest.mark.parametrize("form", PROGRAMS)
def test_a_rank_that_was_too_late_can_go_on(form, tmp_path):
    """All ranks of the run that was given up get an error, and the next one is right.

    The rank is late twice: in the first run of the program, and in a later one.
    """
    status, lines = run(
        tmp_path,
        PROGRAMS[form]
        + textwrap.dedent(
            """
            fio.config(timeout=600)
            compiled = step.lower(tokens, topk_idx).compile()
            for when in ("in its first run", "later"):
                barrier(f"all can start {when}")
                fio.config(timeout=1.5)
                if me == 1:
                    barrier(f"the others have given up {when}")
                start = time.monotonic()
                say("error", error_of(compiled))
                assert me != 1 or time.monotonic() - start < 1.4
                if me == 0:
                    barrier(f"the others have given up {when}")
                barrier(f"all are back {when}")
                fio.config(timeout=60)
                for _ in range(3):
                    assert right(compiled(tokens, topk_idx))
            """
        ),
        processes=2,
        devices_per_process=2,
    )
    assert status == 0, "\n".join(str(line) for one in lines for line in one)
    early, late = said(lines, "error")
    assert len(early) == len(late) == 2, lines
    for message in early:
        assert "waited 1.5 s for" in message and "Process 1 (pid" in message, message
    for message in late:
        assert "reported by process 0" in message, message


TWO_AXES = """
from functools import partial
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
sharding = NamedSharding(mesh, P(("data", "model")))
tokens, topk_idx = (
    whole(np.arange(16 * 3, dtype=np.float32).reshape(16, 3)), whole(np.zeros((16, 1), np.int32)))
def exchange_along(axis, x, i):
    out = fio.dispatch(x, i, num_experts=2, axis_name=axis)
    return fio.combine(out.tokens, out.handle)
slow = False
def wait(x):
    if slow:
        time.sleep(2.5)
    return x
def layer(axes, x, i, step):
    late = jax.lax.axis_index(("data", "model")) == 3
    x = lax.cond(late, lambda x: jax.pure_callback(wait, x, x), lambda x: x, x)
    x = x + step
    for axis in axes:
        x = exchange_along(axis, x, i)
    return x - step
def make(*axes):
    return jax.jit(jax.shard_map(
        partial(layer, axes), mesh=mesh, in_specs=(P(("data", "model")),) * 2 + (P(),),
        out_specs=P(("data", "model")), check_vma=False))
"""


@pytest.mark.parametrize("processes", [2, 4])
def test_a_late_rank_ends_the_run_in_all_its_groups(processes, tmp_path):
    """Along the second axis, too, which some ranks have come to, and others have not.

    All ranks make as many calls. Each adds another number, so that calls of two of them differ.
    """
    status, lines = run(
        tmp_path,
        TWO_AXES
        + textwrap.dedent(
            """
            for axes in (("data", "model"), ("model", "data")):
                step = make(*axes)
                fio.config(timeout=600)
                assert right(step(tokens, topk_idx, 0))
                barrier(f"warm along {axes}")
                fio.config(timeout=1.5)
                slow = True
                say("error", error_of(lambda *_: step(tokens, topk_idx, 1)))
                barrier(f"all are back from {axes}")
                slow = False
                fio.config(timeout=20)
                for n in range(3):
                    assert right(step(tokens, topk_idx, 100 * n))
            """
        ),
        processes=processes,
        devices_per_process=4 // processes,
    )
    assert status == 0, "\n".join(str(line) for one in lines for line in one)
    for messages in said(lines, "error"):
        assert len(messages) == 2, lines
        assert all("waited 1.5 s for" in message for message in messages), lines


def test_ranks_that_give_up_again_and_again_meet_again(tmp_path):
    """Without a barrier: the others try until the late one has come."""
    status, lines = run(
        tmp_path,
        """
        step = program(lambda x, i: exchange(exchange(x, i), i))
        assert right(step(tokens, topk_idx))
        fio.config(timeout=1.0)
        if me == 1:
            time.sleep(3.5)
        failures = 0
        while True:
            try:
                assert right(step(tokens, topk_idx))
                break
            except (ValueError, jax.errors.JaxRuntimeError):
                failures += 1
        say("failures", failures)
        fio.config(timeout=60)
        assert right(step(tokens, topk_idx))
        """,
        processes=3,
    )
    assert status == 0, "\n".join(str(line) for one in lines for line in one)
    assert all(1 <= int(count) < 10 for (count,) in said(lines, "failures")), lines


@pytest.mark.parametrize("layout", ["one process", "pod"])
def test_who_waits_for_whom_is_told_before_the_time_out(layout, tmp_path):
    pod = layout == "pod"
    status, lines = run(
        tmp_path,
        """
        fio._native.set_patience(0.5)
        def wait(x):
            if me == jax.process_count() - 1:
                time.sleep(1.7)
            return x
        def layer(x, topk_idx):
            late = lax.axis_index("expert") == ranks - 1
            x = lax.cond(late, lambda x: jax.pure_callback(wait, x, x), lambda x: x, x)
            return exchange(x, topk_idx)
        step = program(layer, check_vma=False)
        assert right(step(tokens, topk_idx))
        """,
        processes=2 if pod else 1,
        devices_per_process=1 if pod else 2,
    )
    assert status == 0, "\n".join(str(line) for one in lines for line in one)
    notes = [line for line in lines[0] if "has waited" in line]
    waiter = r"freeio_jax: freeio_jax.dispatch: rank 0 \(mesh device 0\)"
    if pod:
        waiter += r" of process 0 \(pid \d+\)"
    # On a crowded machine it may wait for longer, and says so once more.
    assert len(notes) >= 2, lines
    for note, seconds in zip(notes, ("0.5", "1", "2", "4", "8"), strict=False):
        assert re.match(
            rf"{waiter} has waited {seconds} s \(it gives up after 600 s\) for rank 1 \(mesh",
            note,
        ), note
    assert not pod or ("Process 1 (pid" in notes[0] and "waits in no exchange" in notes[0])


def test_who_is_waited_for_in_initialize_is_told(tmp_path):
    status, lines = run(
        tmp_path,
        """
        from freeio_jax import bootstrap
        bootstrap._PATIENCE_SECONDS = 0.5
        fio.shutdown()
        barrier("all are out")
        if me == 1:
            time.sleep(1.7)
        fio.initialize()
        assert right(program(exchange)(tokens, topk_idx))
        """,
    )
    assert status == 0, lines
    notes = [line for line in lines[0] if "has waited" in line]
    # On a crowded machine it may wait for longer, and says so once more.
    assert len(notes) >= 2, lines
    for note, seconds in zip(notes, ("0.5", "1", "2", "4", "8"), strict=False):
        assert note == (
            f"freeio_jax: freeio_jax.initialize: process 0 has waited {seconds} s (it gives up "
            "after 600 s) for the others to call it, which leaves process(es) [1]"
        )


def test_another_shape_in_one_process_is_told_at_once(tmp_path):
    """Not after the time-out: programs of one name, of which each lacks the other's call."""
    status, lines = run(
        tmp_path,
        """
        fio.config(timeout=600)
        def step(x, topk_idx):
            return exchange(x, topk_idx)
        step = program(step)
        rows = 4 + 2 * me
        x = whole(np.ones((rows * ranks, 3), np.float32))
        i = whole(np.zeros((rows * ranks, 1), np.int32))
        start = time.monotonic()
        say("error", error_of(lambda *_: step(x, i)))
        assert time.monotonic() - start < 30
        """,
    )
    assert status == 0, "\n".join(str(line) for one in lines for line in one)
    for (message,) in said(lines, "error"):
        assert "num_tokens=4" in message and "num_tokens=6" in message, message


ORDER = """
def once(scale):
    def one_call(x, topk_idx):
        return exchange(scale * x, topk_idx)
    return program(one_call)
def three_times(scale):
    def three_calls(x, topk_idx):
        part = jax.jit(lambda x: exchange(scale * x, topk_idx))
        return (part(x) + part(2 * x) + part(4 * x)) / 7
    return program(three_calls)
"""


@pytest.mark.parametrize("how", ["pool", "threads", "again", "loaded"])
def test_programs_of_one_name_made_in_another_order(how, tmp_path):
    """Names of exchanges do not depend on what else a process has compiled, or when."""
    if how == "loaded" and jax.__version_info__ < (0, 12):
        pytest.skip("this JAX loads on threads of a pool: docs/transformations.md has the remedy")
    status, lines = run(
        tmp_path,
        ORDER
        + textwrap.dedent(
            """
            import threading
            from jax.experimental import serialize_executable
            how = sys.argv[1]
            fio.config(timeout=20)
            lower = lambda f: f.lower(tokens, topk_idx)
            for make in (once, three_times):
                x1, x3 = make(1.0), make(3.0)
                if me == 0:
                    lowered = [lower(f) for f in (x1, x3)]
                    compiled = [l.compile() for l in lowered]
                elif how == "pool":
                    lowered = [lower(f) for f in (x1, x3)]
                    compiled = [l.compile() for l in reversed(lowered)][::-1]
                elif how == "threads":
                    compiled = [None, None]
                    def make_one(n, f):
                        compiled[n] = lower(f).compile()
                    threads = [
                        threading.Thread(target=make_one, args=a) for a in ((1, x3), (0, x1))]
                    [t.start() for t in threads]
                    [t.join() for t in threads]
                elif how == "again":
                    for f in (x3, x1, x3):
                        lower(f).compile({"xla_embed_ir_in_executable": True})
                    compiled = [lower(f).compile() for f in (x1, x3)]
                else:
                    stored = [serialize_executable.serialize(lower(f).compile()) for f in (x1, x3)]
                    compiled = [serialize_executable.deserialize_and_load(*s) for s in stored]
                barrier(f"{make.__name__} compiled")
                for _ in range(2):
                    assert right(compiled[0](tokens, topk_idx), 1.0)
                    assert right(compiled[1](tokens, topk_idx), 3.0)
            say("right")
            """
        ),
        how,
    )
    assert status == 0 and said(lines, "right") == [[""], [""]], lines


FORK = """
fio.config(timeout=60)
step = program(exchange)
assert right(step(tokens, topk_idx))
if me == 1:
    child = os.fork()
    if child == 0:
        {child}
"""


def test_a_forked_child_that_ends_does_no_harm(tmp_path):
    """However it ends, and also where another one has ended before."""
    ends = {
        "as a program": "sys.exit(0)",
        "after a shutdown": "fio.shutdown(); os._exit(0)",
        "at once": "os._exit(0)",
    }
    status, lines = run(
        tmp_path,
        f"""
        fio.config(timeout=60)
        step = program(exchange)
        assert right(step(tokens, topk_idx))
        for name, end in {ends}.items():
            if me == 1:
                child = os.fork()
                if child == 0:
                    exec(end)
                os.waitpid(child, 0)
            barrier(f"a child has ended {{name}}")
            for _ in range(2):
                assert right(step(tokens, topk_idx))
        """,
    )
    assert status == 0, "\n".join(str(line) for one in lines for line in one)


def test_a_forked_child_can_be_asked_to_end(tmp_path):
    """By a pool of workers, for instance."""
    status, lines = run(
        tmp_path,
        FORK.format(child="time.sleep(100); os._exit(0)")
        + textwrap.dedent(
            """
                time.sleep(1)
                os.kill(child, signal.SIGTERM)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
            barrier("the child has ended")
            assert right(step(tokens, topk_idx))
            """
        ),
    )
    assert status == 0, lines


@pytest.mark.parametrize("parent", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(9)"])
def test_a_parent_that_ends_is_noticed_though_its_child_lives_on(parent, tmp_path):
    status, lines = run(
        tmp_path,
        FORK.format(child="time.sleep(20); os._exit(0)")
        + textwrap.dedent(
            f"""
                {parent}
            start = time.monotonic()
            say("error", error_of(step))
            assert time.monotonic() - start < 10
            os._exit(0)
            """
        ),
        grace=10,
    )
    assert status != 0
    ((message,), _) = said(lines, "error")
    assert re.search(r"process 1 \(pid \d+\).* ended while process 0", message), message


@pytest.mark.parametrize("connected", [True, False])
def test_a_sigterm_waits_until_a_forked_child_can_be_ended_by_one(connected, monkeypatch):
    """Else JAX's handler takes it, which in the child wakes a thread that is not there."""

    def is_blocked():
        return signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])

    monkeypatch.setattr(runtime, "_pod_is_connected", connected)
    monkeypatch.setattr(runtime, "_forget_pod", lambda: seen.append(is_blocked()))
    for after in (runtime._let_sigterm_come, runtime._start_as_child):
        seen = []
        runtime._hold_sigterm()
        assert is_blocked() == connected
        after()
        assert not is_blocked()
        assert seen in ([], [connected])
