"""Programs that one process compiles or exports, and another one runs that never lowers a call."""

import os
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

from freeio_jax import engines
from freeio_jax.launch import Pod

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "transformations.md"

PRELUDE = """
import pathlib, pickle, sys
import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.experimental import serialize_executable
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

FOLDER = pathlib.Path(sys.argv[1])

def arguments():
    '''The mesh, and arrays on it, the same in every process.'''
    ranks = jax.device_count()
    mesh = jax.make_mesh((ranks,), ("expert",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    arrays = (
        rng.standard_normal((5 * ranks, 3)).astype(np.float32),
        rng.integers(-1, 2 * ranks, (5 * ranks, 2)).astype(np.int32),
        rng.random((5 * ranks, 2)).astype(np.float32),
    )
    sharding = NamedSharding(mesh, P("expert"))
    return mesh, [
        jax.make_array_from_callback(a.shape, sharding, lambda index, a=a: a[index])
        for a in arrays
    ]

def show(results):
    for result in jax.tree.leaves(results):
        for shard in result.addressable_shards:
            print(*np.asarray(shard.data).ravel().tolist(), flush=True)
"""

SAVE = """
import freeio_jax as fio

mesh, args = arguments()

def layer(tokens, topk_idx, weights):
    out = fio.dispatch(
        tokens, topk_idx, num_experts=2 * mesh.size, axis_name="expert", capacity=40
    )
    return fio.combine(jnp.sin(out.tokens), out.handle, weights)

layer = jax.shard_map(layer, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))

@jax.jit
def layer_and_gradients(tokens, topk_idx, weights):
    z, pull = jax.vjp(lambda tokens, weights: layer(tokens, topk_idx, weights), tokens, weights)
    return z, pull(jnp.cos(z))

compiled = layer_and_gradients.lower(*args).compile()
where = FOLDER / f"executable{jax.process_index()}"
where.write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))
allow = export.DisabledSafetyCheck.custom_call
checks = [allow(f"freeio_{name}") for name in ("dispatch", "combine", "combine_transpose", "check")]
exported = export.export(layer_and_gradients, disabled_checks=checks)(*args)
(FOLDER / f"exported{jax.process_index()}").write_bytes(exported.serialize())
show(compiled(*args))
"""

LOAD = """
_, args = arguments()
blob = (FOLDER / f"{sys.argv[2]}{jax.process_index()}").read_bytes()
if sys.argv[2] == "executable":
    program = serialize_executable.deserialize_and_load(
        *pickle.loads(blob), execution_devices=jax.devices()
    )
else:
    program = jax.jit(export.deserialize(bytearray(blob)).call)
show(program(*args))
"""

IMPORTS = {
    "before there is a backend": "import freeio_jax",
    "after there is a backend": "jax.devices(); import freeio_jax",
}


def run_program(folder, text, *arguments):
    """What ``text`` prints, in a process of four devices."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(text), str(folder), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a program in both forms, and what it printed where it was saved."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_program(folder, SAVE)


@pytest.mark.parametrize("imports", IMPORTS.values(), ids=IMPORTS)
@pytest.mark.parametrize("form", ["executable", "exported"])
def test_a_process_that_lowers_nothing_runs_it(saved, form, imports):
    folder, expected = saved
    assert run_program(folder, imports + LOAD, form) == expected


def test_importing_freeio_jax_starts_no_backend(tmp_path):
    program = """
        import freeio_jax
        from jax._src import xla_bridge
        assert not xla_bridge.backends_are_initialized()
        jax.config.update("jax_num_cpu_devices", 3)
        """
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    text = PRELUDE + textwrap.dedent(program) + "print(len(jax.devices()))"
    done = subprocess.run(
        [sys.executable, "-c", text, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "3\n", done.stderr


def run_pod(folder, text, *arguments):
    """(exit status, standard output by process, everything) of two processes of two devices."""
    script = folder / "program.py"
    script.write_text(
        "import jax\njax.distributed.initialize()\n" + PRELUDE + textwrap.dedent(text)
    )
    lines = []
    command = [str(script), str(folder), *arguments]
    pod = Pod(
        command, num_processes=2, devices_per_process=2, output=lambda *line: lines.append(line)
    )
    status = pod.run()
    said = [[line for p, stream, line in lines if p == q and stream == "stdout"] for q in range(2)]
    return status, said, "\n".join(line for _, _, line in lines)


def test_the_processes_of_a_pod_run_it(tmp_path):
    initialize = "import freeio_jax as fio; fio.initialize()"
    status, expected, output = run_pod(tmp_path, initialize + SAVE)
    assert status == 0, output
    for form in ("executable", "exported"):
        status, said, output = run_pod(tmp_path, initialize + LOAD, form)
        assert status == 0, output
        assert said == expected
        status, _, output = run_pod(tmp_path, "import freeio_jax" + LOAD, form)
        assert status != 0
        assert "Call freeio_jax.initialize() in each of them" in output


def test_the_documented_checks_are_those_of_all_calls():
    (operations,) = re.findall(r"operations = (\(.*?\))", PAGE.read_text())
    assert '(*operations, "check", "meet", *starts, "done")' in PAGE.read_text()
    operations = {f"freeio_{name}" for name in re.findall(r'"(\w+)"', operations)}
    only_on_gpus = {"freeio_check", "freeio_done", *(f"{name}_start" for name in operations)}
    for platform, engine in engines.ENGINES.items():
        # On CPU ranks meet by it before XLA's collectives between hosts.
        expected = operations | (only_on_gpus if platform == "cuda" else {"freeio_meet"})
        assert set(engine.native.ffi_targets()) == expected
