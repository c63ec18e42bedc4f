"""The setting `verbosity`, and what it has freeio_jax say."""

import logging
import os
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from helpers import make_mesh
from jax.sharding import PartitionSpec as P

import freeio_jax as fio


def exchange(num_tokens):
    """Compiles a dispatch of a new shape."""
    mesh = make_mesh(2)

    def body(tokens, topk_idx):
        return fio.dispatch(tokens, topk_idx, num_experts=4, axis_name="expert").tokens

    body = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))
    tokens = np.zeros((2 * num_tokens, 3), np.float32)
    jax.block_until_ready(body(tokens, np.zeros((2 * num_tokens, 2), np.int32)))


@pytest.fixture
def verbosity():
    yield lambda value: fio.config(verbosity=value)
    fio.config(verbosity=0)


def test_compiled_exchanges_are_logged_at_2(verbosity, caplog):
    for value, num_tokens in ((0, 11), (1, 12)):
        verbosity(value)
        exchange(num_tokens)
        assert "compiles" not in caplog.text
    verbosity(2)
    exchange(13)
    (record,) = (r for r in caplog.records if "compiles" in r.message)
    assert record.name == "freeio_jax" and record.levelno == logging.DEBUG
    assert "freeio_dispatch(int32[13, 2], float32[13, 3])" in record.message
    assert "num_ranks=2, num_tokens=13, top_k=2, num_experts=4, capacity=52" in record.message
    assert "1 group(s) of 2 rank(s) along ('expert',)" in record.message
    processes = jax.process_count()
    assert ("in one process" if processes == 1 else f"across {processes}") in record.message


@pytest.mark.parametrize("value", [-1, 3, "loud"])
def test_other_values_are_errors(value):
    with pytest.raises(ValueError, match="verbosity"):
        fio.config(verbosity=value)
    assert fio.config()["verbosity"] == 0


PROGRAM = """
    import jax, numpy as np
    from jax.sharding import Mesh, PartitionSpec as P
    {setup}
    import freeio_jax as fio
    mesh = Mesh(np.array(jax.devices()), ("expert",))
    def body(tokens, topk_idx):
        return fio.dispatch(tokens, topk_idx, num_experts=2, axis_name="expert").tokens
    body = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))
    body(np.zeros((4, 3), np.float32), np.zeros((4, 1), np.int32))
    """


def said(setup="", **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM).format(setup=setup)],
        env=os.environ
        | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
        | environment,
        capture_output=True,
        text=True,
        check=True,
    )


def test_silent_by_default():
    done = said()
    assert done.stdout == "" and "freeio_jax" not in done.stderr


def test_environment_variable_and_stderr():
    done = said(FREEIO_VERBOSITY="2")
    assert done.stdout == ""
    assert "freeio_jax: CPU engine: 2 of 2 devices are in this process\n" in done.stderr
    assert "freeio_jax: compiles freeio_dispatch(" in done.stderr
    assert "compiles" not in said(FREEIO_VERBOSITY="1").stderr


def test_the_program_decides_where_its_log_goes():
    setup = "import logging, sys; logging.basicConfig(stream=sys.stdout, format='LOG %(message)s')"
    done = said(setup, FREEIO_VERBOSITY="1")
    assert "LOG CPU engine" in done.stdout
    assert "CPU engine" not in done.stderr
