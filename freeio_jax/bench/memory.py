"""Peak memory of an MoE layer in chunks, as XLA plans it for two H200s that need not be there.

    python -m freeio_jax.bench --memory

runs this file as a program of its own, because it must import freeio_jax with a stand-in for the
CUDA engine (``absent.py``). It writes a JSON list of records to standard output.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

HERE = pathlib.Path(__file__).parent
TOPOLOGY = "1x1x2"


def _absent():
    spec = importlib.util.spec_from_file_location("absent", HERE / "absent.py")
    absent = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(absent)
    return absent


def records(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One record for each number of chunks, forward and with gradients; sizes are of one GPU."""
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
            num_experts=arguments["num_experts"],
            top_k=arguments["top_k"],
            expert_width=arguments["expert_width"],
            shared_expert_width=arguments["shared_width"],
            capacity_factor=arguments["capacity_factor"],
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

    for gradients in arguments.get("passes", (False, True)):
        for num_chunks in arguments["num_chunks"]:
            planned = program(num_chunks, gradients)
            yield {
                "pass": "with gradients" if gradients else "forward",
                "num_chunks": num_chunks,
                "temporary_bytes": planned.temp_size_in_bytes,
                "argument_bytes": planned.argument_size_in_bytes,
                "result_bytes": planned.output_size_in_bytes,
            }


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules are not those of the standard library
    print(json.dumps(list(records(json.loads(sys.argv[1])))))
