"""Many small exchanges among processes, none of which may hold more at the end than at the start.

    python -m freeio_jax.launch -n 4 tests/pod/load.py --calls 1000000

Prints what process 0 holds as it goes, and fails where any process has grown.
"""

import argparse
import sys
import time

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import freeio_jax as fio
from freeio_jax.info import usage

#: What may come and go: an arena of the allocator, a mapped stack, a thread that is about to end.
MARGIN = {"resident MiB": 16, "descriptors": 2, "mappings": 40, "threads": 8}


def make_run(mesh, calls, tokens_per_rank):
    """A function that makes ``calls`` exchanges in one program and checks what came back."""
    ranks, sharding = mesh.size, NamedSharding(mesh, P("expert"))

    def body(tokens, topk_idx):
        def layer(tokens, _):
            out = fio.dispatch(tokens, topk_idx, num_experts=ranks, axis_name="expert")
            return fio.combine(out.tokens / 2, out.handle), None

        return lax.scan(layer, tokens, length=calls // 2)[0]

    body = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))
    rng = np.random.default_rng(0)
    tokens = rng.integers(-8, 8, (ranks * tokens_per_rank, 8)).astype(np.float32)
    topk_idx = rng.permuted(np.tile(np.arange(ranks), (len(tokens), 1)), axis=1)
    topk_idx = topk_idx[:, :2].astype(np.int32)
    args = [
        jax.make_array_from_callback(a.shape, sharding, lambda index, a=a: a[index])
        for a in (tokens, topk_idx)
    ]

    def run():
        # Each token goes to two ranks and comes back halved from both: it is what it was.
        for shard in jax.block_until_ready(body(*args)).addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), tokens[shard.index])

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--calls", type=int, default=1_000_000, help="exchanges in all")
    parser.add_argument("--calls-per-run", type=int, default=20, help="of one program")
    parser.add_argument("--tokens", type=int, default=4, help="of each rank")
    parser.add_argument("--intervals", type=int, default=10, help="to print at")
    options = parser.parse_args()

    jax.distributed.initialize()
    fio.initialize()
    mesh = Mesh(np.array(jax.devices()), ("expert",))
    run = make_run(mesh, options.calls_per_run, options.tokens)
    runs = options.calls // options.calls_per_run
    marks = {round(runs * i / options.intervals) for i in range(1, options.intervals + 1)}

    def report(done):
        if jax.process_index() == 0:
            held = ", ".join(f"{value} {name}" for name, value in usage().items())
            print(
                f"{done * options.calls_per_run:>9} calls, {time.monotonic() - start:6.1f} s: "
                f"{held}",
                flush=True,
            )

    for _ in range(max(runs // 100, 20)):  # until every thread and arena there will be is there
        run()
    start, before = time.monotonic(), usage()
    report(0)
    for done in range(1, runs + 1):
        run()
        if done in marks:
            report(done)
    seconds, after = time.monotonic() - start, usage()
    grown = [name for name in MARGIN if after[name] > before[name] + MARGIN[name]]
    if grown:
        sys.exit(f"process {jax.process_index()} has grown: {before} -> {after}")
    if jax.process_index() == 0:
        calls = runs * options.calls_per_run
        print(
            f"{calls} calls among {jax.process_count()} processes of "
            f"{jax.local_device_count()} device(s), {seconds / calls * 1e6:.0f} us each: "
            "nothing has grown"
        )


if __name__ == "__main__":
    main()
