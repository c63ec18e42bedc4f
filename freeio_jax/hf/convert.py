"""From a checkpoint of Hugging Face to one of orbax, and back onto any mesh."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from freeio_jax.flax.mesh import check_divides
from freeio_jax.hf.checkpoint import Checkpoint
from freeio_jax.hf.load import Weights, is_of_router, load_moe, moe_layers, tensors_of_layer
from freeio_jax.hf.options import moe_config
from freeio_jax.hf.save import copy_other_files

#: Folders in a converted checkpoint: of the MoE layers, by their names, and of all other tensors.
_LAYERS, _REST = "moe", "rest"


def convert(
    ckpt: Checkpoint, folder: str | os.PathLike, mesh: Mesh, dtype: Any = None
) -> Iterator[str]:
    """Writes an orbax checkpoint, one layer after the other; yields what is written.

    ``folder/moe/LAYER`` has a layer's variables as linen has them, ``params`` and ``router_state``;
    ``folder/rest`` all other tensors by their names, in a flat dict. config.json and the tokenizer
    are copied.

    Args:
      ckpt: of :func:`freeio_jax.hf.open`.
      folder: where to; it must not exist.
      mesh: over whose axis ``expert`` the experts are spread while they are written.
      dtype: of the experts' parameters; None: the ``dtype`` of config.json.
    """
    folder = Path(folder).absolute()
    if folder.exists():
        raise ValueError(f"hf convert: {folder} exists already: give a folder that does not.")
    layers, in_layers = moe_layers(ckpt), set()
    with ocp.StandardCheckpointer() as checkpointer:
        for layer in layers:
            weights = load_moe(ckpt, layer, mesh=mesh, dtype=dtype)
            checkpointer.save(folder / _LAYERS / str(layer), weights.linen)
            # So that the arrays of one layer at a time are in memory.
            checkpointer.wait_until_finished()
            in_layers.update(tensors_of_layer(ckpt, layer))
            yield f"layer {layer}"
        rest = {n: np.asarray(ckpt.tensor(n)) for n in ckpt.names() if n not in in_layers}
        if rest:
            checkpointer.save(folder / _REST, rest)
            checkpointer.wait_until_finished()
            yield f"{len(rest)} other tensors"
    copy_other_files(ckpt, folder)


def restore_moe(
    folder: str | os.PathLike,
    layer: int | str,
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    **options: Any,
) -> Weights:
    """Restores an MoE layer of a converted checkpoint onto any mesh.

    Args:
      folder: of :func:`convert`.
      layer, mesh, options: as :func:`freeio_jax.hf.load_moe` takes them.
      dtype: of the experts' parameters; None: as they were written.

    Raises:
      FileNotFoundError: there is no such layer.
      ValueError: the experts do not divide among the ranks.
    """
    folder = Path(folder).absolute()
    path = folder / _LAYERS / str(layer)
    if not path.is_dir():
        raise FileNotFoundError(
            f"hf.restore_moe: there is no {path}. Write it by python -m freeio_jax.hf convert."
        )
    mesh = jax.sharding.get_mesh() if mesh is None else mesh
    raw = json.loads((folder / "config.json").read_text())
    width, config = moe_config(raw, layer, **options)
    check_divides(config, mesh)
    axes = {name: names for name, (_, names) in config.parameters(width).items()}

    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(path).item_metadata

        def place(path, metadata):
            name = path[-1].key
            spec = PartitionSpec(*axes.get(name, ()))
            device = SingleDeviceSharding(jax.local_devices()[0])
            sharding = device if mesh.empty else NamedSharding(mesh, spec)
            keeps = dtype is None or is_of_router(name)
            wanted = metadata.dtype if keeps else np.dtype(dtype)
            return jax.ShapeDtypeStruct(metadata.shape, wanted, sharding=sharding)

        abstract = jax.tree_util.tree_map_with_path(place, dict(stored))
        return Weights.of_linen(checkpointer.restore(path, abstract))
