"""Peak memory of an MoE layer in chunks, as XLA plans it for two H200s that need not be there.

    python -m freeio_jax.bench --memory

runs this file as a program of its own, because it must import freeio_jax with a stand-in for the
CUDA engine (``absent.py``). It writes a JSON list of records to standard output.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

HERE = pathlib.Path(__file__).parent
TOPOLOGY = "1x1x2"

COLUMNS = {
    "model": "model",
    "num_tokens": "T",
    "pass": "pass",
    "num_chunks": "n",
    "temporary_bytes": "temporaries MB",
    "argument_bytes": "arguments MB",
    "result_bytes": "results MB",
}


def run(options: dict[str, Any]) -> list[dict[str, Any]]:
    """:func:`records`, by a program of its own.

    Raises:
      RuntimeError: the program failed, with what it has written.
    """
    folder = HERE.parent.parent
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(options)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(
            f"the program that compiles for GPUs failed: {done.stderr[-2000:]} It needs "
            "jax-cuda13-plugin and jax-cuda13-pjrt of jax's version."
        )
    return json.loads(done.stdout.splitlines()[-1])


def _absent():
    spec = importlib.util.spec_from_file_location("absent", HERE / "absent.py")
    absent = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(absent)
    return absent


def records(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One record for each number of chunks, forward and with gradients; sizes are of one GPU.

    Args:
      arguments: hidden, num_experts, top_k, expert_width, num_tokens (of one GPU), capacity_factor,
        product (what multiplies the experts' rows), and num_chunks, a list.
    """
    absent = _absent()
    absent.import_with_stand_in()

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from freeio_jax.flax import MoEConfig, moe
    from freeio_jax.grouped_matmul import use

    devices = np.array(absent.devices(TOPOLOGY))
    mesh = Mesh(devices, ("expert",), axis_types=(AxisType.Auto,))

    def shape_of(spec, dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def program(num_chunks, gradients):
        width = arguments["hidden"]
        config = MoEConfig(
            overlap=True,
            num_experts=arguments["num_experts"],
            top_k=arguments["top_k"],
            expert_width=arguments["expert_width"],
            capacity_factor=arguments["capacity_factor"],
            drops="last",
            num_chunks=num_chunks,
        )
        parameters = {
            name: shape_of(P(*names), jnp.bfloat16, *shape)
            for name, (shape, names) in config.parameters(width).items()
        }
        x = shape_of(P("expert"), jnp.bfloat16, mesh.size * arguments["num_tokens"], width)

        def forward(parameters, x):
            with use(arguments["product"]):
                return moe(parameters, x, config, mesh=mesh)[0]

        def backward(parameters, x, cotangent):
            return jax.vjp(forward, parameters, x)[1](cotangent)

        function, args = (backward, (parameters, x, x)) if gradients else (forward, (parameters, x))
        return jax.jit(function).lower(*args).compile().memory_analysis()

    for gradients in (False, True):
        for num_chunks in arguments["num_chunks"]:
            planned = program(num_chunks, gradients)
            yield {
                "pass": "with gradients" if gradients else "forward",
                "num_ranks": mesh.size,
                "num_chunks": num_chunks,
                "temporary_bytes": planned.temp_size_in_bytes,
                "argument_bytes": planned.argument_size_in_bytes,
                "result_bytes": planned.output_size_in_bytes,
            }


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules are not those of the standard library
    print(json.dumps(list(records(json.loads(sys.argv[1])))))
