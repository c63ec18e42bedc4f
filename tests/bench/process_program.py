"""Run by the launcher: the parts of the benchmark whose sizes the command line does not set."""

import contextlib
import os

import jax

import freeio_jax
from freeio_jax.bench import check, late, mix, processes
from freeio_jax.bench.report import Report
from freeio_jax.bench.shapes import Suite

jax.distributed.initialize()
freeio_jax.initialize()
num_ranks = jax.device_count()
shapes = (check.CheckShape(5, 8, 2, 4), check.CheckShape(9, 16, 2, 4, 0.5, 2, "float32"))
report = Report({})
with contextlib.ExitStack() as stack:
    if not processes.is_first():
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
    check.run(report, num_ranks=num_ranks, exchanges=["freeio", "dense"], shapes=shapes)
    check.soak(report, 3, num_ranks=num_ranks, shapes=shapes)
    mix.run(report, 4, num_ranks=num_ranks, sizes=((6, 8),), programs=2, inputs=1)
    suite = Suite("tiny", 8, 2, 8, "uniform", (6,))
    late.run(
        report, [suite], num_ranks=num_ranks, ops=["combine"], dtype="float32", milliseconds=(0.0,)
    )
    shared = processes.share(jax.process_index())
    print("shared", shared)
    with processes.among(jax.devices()[:1]) as takes_part:
        assert takes_part == processes.is_first()
        if takes_part:
            assert processes.share("mine") == ["mine"]
    processes.share(None)
assert report.failed == 0
