"""A checkpoint's weights into a :class:`Decoder`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from freeio_jax import hf
from freeio_jax.flax.nnx import MoE
from models.decoder import Decoder


def load(
    checkpoint: hf.Checkpoint, *, mesh, dtype, moe_options: dict[str, Any] | None = None
) -> Decoder:
    """The model of a checkpoint, on ``mesh``.

    The experts are spread over the mesh's axis "expert": each device gets its own ones only. All
    other parameters are on every device.

    Raises:
      ValueError: the config asks for what the model cannot do, or a weight is missing or has
        another shape.
    """
    model = shapes_of(checkpoint.config, mesh=mesh, dtype=dtype, moe_options=moe_options)
    everywhere, parameters = NamedSharding(mesh, P()), []
    for path, name, parameter, transposed in dense_parameters(model):
        array = checkpoint.tensor(name)
        array = array.T if transposed else array
        if array.shape != parameter.shape:
            raise ValueError(
                f"{checkpoint.folder}: {name} has shape {array.shape}, but config.json asks for "
                f"{parameter.shape}."
            )
        array = jax.device_put(array.astype(dtype), everywhere)
        parameters.append((path, parameter.replace(array)))
    nnx.update(model, nnx.from_flat_state(parameters))
    for i, layer in enumerate(model.layers):
        if isinstance(layer.mlp, MoE):
            nnx.update(layer.mlp, hf.load_moe(checkpoint, i, mesh=mesh, dtype=dtype).nnx)
    return model


def shapes_of(config: dict, **options) -> Decoder:
    """A model whose parameters are shapes alone. ``options``: those of :class:`Decoder`."""
    return nnx.eval_shape(lambda: Decoder(config, **options, rngs=nnx.Rngs(0)))


def dense_parameters(model: Decoder) -> Iterator[tuple[tuple, str, nnx.Param, bool]]:
    """All parameters outside the MoE layers: path, name in the checkpoint, Variable, transposed.

    A checkpoint's matrices are ``[out, in]``. Those of ``nnx.Linear`` are ``[in, out]``.
    """
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[0] == "layers" and path[2] == "mlp" and isinstance(model.layers[path[1]].mlp, MoE):
            continue
        *module, kind = map(str, path)
        name = ".".join([*module, "weight" if kind in _WEIGHTS else kind])
        name = name if module[0] == "lm_head" else f"model.{name}"
        yield path, name, parameter, kind == "kernel"


#: What Flax calls the weight of a linear map, a norm and an embedding.
_WEIGHTS = ("kernel", "scale", "embedding")
