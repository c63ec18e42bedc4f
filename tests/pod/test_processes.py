"""Programs of several processes, beyond what the contract tests do when they run on a pod."""

import textwrap

from freeio_jax.launch import Pod

PRELUDE = """
import os
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import freeio_jax as fio

jax.distributed.initialize()
mesh = Mesh(np.array(jax.devices()), ("expert",))
ranks, sharding = mesh.size, NamedSharding(mesh, P("expert"))

def layer(tokens, topk_idx):
    # Three instances with equal attributes, which nothing orders.
    part = jax.jit(lambda x: fio.combine((out := fio.dispatch(
        x, topk_idx, num_experts=ranks, axis_name="expert")).tokens, out.handle))
    return part(tokens), part(2 * tokens), part(3 * tokens)

layer = jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))
tokens = np.arange(ranks * 4 * 3, dtype=np.float32).reshape(-1, 3)
topk_idx = np.random.default_rng(0).integers(-1, ranks, (len(tokens), 2)).astype(np.int32)

def step():
    args = [
        jax.make_array_from_callback(a.shape, sharding, lambda index, a=a: a[index])
        for a in (tokens, topk_idx)
    ]
    rows = (topk_idx >= 0).sum(axis=1)[:, None] * tokens
    for factor, z in enumerate(jax.block_until_ready(layer(*args)), start=1):
        for shard in z.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), factor * rows[shard.index])
"""


def run(tmp_path, program, **options):
    script = tmp_path / "program.py"
    script.write_text(PRELUDE + textwrap.dedent(program))
    lines = []
    pod = Pod([str(script)], output=lambda *line: lines.append(line), **options)
    status = pod.run()
    assert status == 0, "\n".join(f"[{rank}] {line}" for rank, _, line in lines)
    return [line for _, stream, line in lines if stream == "stdout"]


def test_one_process_loads_what_the_other_compiles(tmp_path, monkeypatch):
    """With a persistent compilation cache, of which JAX lets process 0 alone write."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    sizes = []
    for _ in range(2):
        run(tmp_path, "fio.initialize(); step(); step()", num_processes=2, devices_per_process=2)
        sizes.append(len(list((tmp_path / "cache").glob("*-cache"))))
    assert sizes[0] == sizes[1] > 0  # nothing was compiled anew for another name


def test_initialize_and_shutdown(tmp_path):
    program = """
        from jax.experimental import multihost_utils
        for _ in range(2):
            fio.initialize()
            fio.initialize()
            step()
            multihost_utils.sync_global_devices("before anybody leaves")
            fio.shutdown()
            fio.shutdown()
            try:
                step()
            except Exception as error:
                assert "shutdown" in str(error) or "left" in str(error), error
                print("refused", flush=True)
            multihost_utils.sync_global_devices("everybody has left")
        """
    lines = run(tmp_path, program, num_processes=2)
    assert lines.count("refused") == 4


def test_an_initialize_that_failed_can_be_repeated(tmp_path):
    """For instance as the driver does not let a GPU's memory be mapped."""
    program = """
        from freeio_jax import runtime
        attempts = []
        def join():
            attempts.append(len(runtime.members()))
            if len(attempts) == 1:
                raise RuntimeError("not today")
        runtime.add_pod_member(runtime.PodMember(join, lambda: None))
        try:
            fio.initialize()
        except RuntimeError as error:
            print(error, flush=True)
        assert runtime.members() is None
        fio.initialize()
        assert attempts == [1, 1]
        step()
        """
    assert run(tmp_path, program, num_processes=2) == ["not today"] * 2


def test_descriptors_and_mappings_do_not_grow(tmp_path):
    program = """
        fio.initialize()
        def held():
            return len(os.listdir("/proc/self/fd")), sum(1 for _ in open("/proc/self/maps"))
        for _ in range(20):
            step()
        before = held()
        for _ in range(200):
            step()
        after = held()
        assert after[0] <= before[0] + 1 and after[1] <= before[1] + 20, (before, after)
        """
    run(tmp_path, program, num_processes=3)
