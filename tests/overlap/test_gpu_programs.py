"""Programs that XLA has compiled and scheduled for GPUs that are not there.

Start comes before compute, and compute before done, whatever the scheduler. Nothing touches what a
start writes before its done, and XLA keeps what the start reads.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hlo
import pytest

needs_xla_for_gpus = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None
    or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="XLA for GPUs is not installed: pip install jax-cuda13-plugin jax-cuda13-pjrt, of "
    "jax's version. It needs no GPU",
)

PROGRAM = Path(__file__).parent / "gpu_programs.py"
#: Of slices x processes x devices of a process: two GPUs of one process, and of two.
TOPOLOGIES = {"one process": "1x1x2", "two processes": "1x2x1"}
SCHEDULERS = ("default", "latency-hiding", "not-hiding")
ONCE = {"dispatch": 1, "combine": 2, "combine_transpose": 1}
#: The starts of each program. jax.checkpoint exchanges again what it does not save: the dispatch.
#: JAX takes the routing out of a scan that does not change it. What is left goes along the routes.
STARTS = {
    "forward": {"dispatch": 1, "combine": 1},
    "gradients": ONCE,
    "leaf-without-elements": ONCE,
    "two-batches": {name: 2 * count for name, count in ONCE.items()},
    "scan": ONCE,
    "scan-of-one-routing": {"dispatch_along": 1, "combine": 2, "combine_transpose": 1},
    "remat": ONCE | {"dispatch": 2},
    # The first dispatch of a layer is synchronous: nothing could run beside it.
    "whole-layer": {"combine": 2, "combine_transpose": 1},
    "chunks": {"dispatch": 1, "combine": 4, "combine_transpose": 2},
}
#: What runs beside each start, by its number, as named scopes of the layer.
BESIDE = {
    "whole-layer": ("shared_expert", "shared_expert", "weights_gradient"),
    "chunks": (
        *("experts", "experts", "shared_expert"),  # forward
        *("shared_expert", "experts", "experts", "weights_gradient"),
    ),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A function that returns the folder with the programs of a topology."""
    folders = {}

    def compile(topology):
        if topology not in folders:
            folder = folders[topology] = tmp_path_factory.mktemp("programs")
            done = subprocess.run(
                [sys.executable, str(PROGRAM), str(folder), topology],
                env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
                capture_output=True,
                text=True,
                timeout=900,
            )
            assert done.returncode == 0, done.stderr
        return folders[topology]

    return compile


def is_compute(instruction, scope):
    """Whether this is compute of a function that is to run beside an exchange."""
    return (
        instruction.opcode not in hlo.NAMES
        and instruction.start is None
        and re.search(rf'op_name="[^"]*\b{scope}\b', instruction.line)
    )


@needs_xla_for_gpus
@pytest.mark.timeout(900)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("case", STARTS)
@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=TOPOLOGIES)
def test_what_a_scheduled_program_does(topology, case, scheduler, compiled):
    text = (compiled(topology) / f"{case}.{scheduler}").read_text()
    found = Counter()
    for computation in hlo.computations(text):
        numbered = [i for i in computation.instructions if i.start is not None]
        starts = {i.start: i for i in numbered if i.target != "freeio_done"}
        dones = {i.start: i for i in numbered if i.target == "freeio_done"}
        assert len(starts) + len(dones) == len(numbered)
        # Each start has its done in the same computation: one loop body, one branch.
        assert starts.keys() == dones.keys()
        for number, start in starts.items():
            found[start.target.removeprefix("freeio_").removesuffix("_start")] += 1
            scope = BESIDE[case][number] if case in BESIDE else "beside"
            check(computation, start, dones[number], scope)
        if starts and case in BESIDE:
            check_that_all_is_hidden(computation, starts, dones)
    assert found == STARTS[case]


def check_that_all_is_hidden(computation, starts, dones):
    """All of the shared expert, and the gradients of weights, run beside some exchange."""
    order = computation.instructions
    hidden = {
        instruction.name
        for number, start in starts.items()
        for instruction in order[order.index(start) : order.index(dones[number])]
    }
    for scope in ("shared_expert", "weights_gradient"):
        found = [i.name for i in order if is_compute(i, scope)]
        assert found
        assert not set(found) - hidden


def check(computation, start, done, scope="beside"):
    order = computation.instructions
    between = order[order.index(start) + 1 : order.index(done)]
    assert order.index(start) < order.index(done)
    assert any(is_compute(i, scope) for i in between), (
        f"nothing runs beside {start.name}: {[i.name for i in between]}"
    )
    # Nothing looks at what is not there yet: not even a copy.
    assert computation.users(start.name) == [done]
    # The buffers that the exchange reads are in use until done.
    num_operands = len(start.operands)
    assert done.operands[:num_operands] == start.operands
    # And so are all that it writes. The results of done lie where the start has written them.
    results = [computation.origin(operand) for operand in done.operands[num_operands:]]
    assert results == [(start.name, i) for i in range(len(results))]
    assert done.aliases == {i: num_operands + i for i in range(len(done.aliases))}
    assert done.aliases


# --- The checks can fail -------------------------------------------------------------------------

SCHEDULE = """HloModule jit_f, is_scheduled=true

ENTRY %main (x: f32[4], w: f32[4]) -> (f32[4], f32[4]) {
  %x = f32[4]{0} parameter(0)
  %w = f32[4]{0} parameter(1)
  %s = (f32[4]{0}, u32[2]{0}) custom-call(%x), custom_call_target="freeio_combine_start", \
api_version=API_VERSION_TYPED_FFI, backend_config={num_sms = 0 : i64, start = 3 : i64}
  %r = f32[4]{0} get-tuple-element(%s), index=0
  %t = (f32[4]{0}, f32[4]{0}) tuple(%r, %w)
  %rt = f32[4]{0} get-tuple-element(%t), index=0
  %wt = f32[4]{0} get-tuple-element(%t), index=1
  %b = f32[4]{0} fusion(%wt), kind=kLoop, calls=%f, metadata={op_name="jit(f)/beside/tanh"}
  %q = u32[2]{0} get-tuple-element(%s), index=1
  %d = f32[4]{0} custom-call(%x, %rt, %q), custom_call_target="freeio_done", \
output_to_operand_aliasing={{}: (1, {})}, api_version=API_VERSION_TYPED_FFI, \
backend_config={start = 3 : i64}
  ROOT %o = (f32[4]{0}, f32[4]{0}) tuple(%d, %b)
}
"""


def check_schedule(text):
    (computation,) = hlo.computations(text)
    start, done = (i for i in computation.instructions if i.start is not None)
    assert start.start == done.start == 3
    check(computation, start, done)


def test_the_checks_pass_what_is_right():
    check_schedule(SCHEDULE)


WRONG = {
    "nothing beside": ("jit(f)/beside/tanh", "jit(f)/tanh"),
    "a copy of a result": (
        "%d = f32[4]{0} custom-call(%x, %rt, %q)",
        "%c = f32[4]{0} copy(%rt)\n  %d = f32[4]{0} custom-call(%x, %c, %q)",
    ),
    "a second reader": ("fusion(%wt)", "fusion(%wt, %r)"),
    "an operand is not kept": ("custom-call(%x, %rt, %q)", "custom-call(%w, %rt, %q)"),
    "scratch is not kept": ("custom-call(%x, %rt, %q)", "custom-call(%x, %rt, %w)"),
    "not in place": ("output_to_operand_aliasing={{}: (1, {})}, ", ""),
    "in place of another": ("{{}: (1, {})}", "{{}: (2, {})}"),
}


@pytest.mark.parametrize("right, wrong", WRONG.values(), ids=WRONG)
def test_the_checks_find_what_is_wrong(right, wrong):
    assert right in SCHEDULE
    with pytest.raises(AssertionError):
        check_schedule(SCHEDULE.replace(right, wrong))


def test_the_checks_find_compute_that_comes_late():
    lines = SCHEDULE.splitlines(keepends=True)
    (number,) = [n for n, line in enumerate(lines) if "beside" in line]
    late = [*lines[:number], *lines[number + 1 : -2], lines[number], *lines[-2:]]
    with pytest.raises(AssertionError, match="nothing runs beside"):
        check_schedule("".join(late))
