"""Writes a checkpoint folder whose MoE layers have other weights, under the same names."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from freeio_jax.hf import safetensors
from freeio_jax.hf.checkpoint import INDEX, Checkpoint
from freeio_jax.hf.load import StoredLayer, Weights

#: Files that are copied besides config.json: the tokenizer's, the model's own code and texts.
_COPIED = (".json", ".jinja", ".md", ".model", ".py", ".txt")


def save(folder: str | os.PathLike, ckpt: Checkpoint, layers: Mapping[int | str, Weights]) -> None:
    """Writes ``ckpt`` anew, with the weights of ``layers``.

    Files, names, layouts and dtypes are those of ``ckpt``, and so is every tensor that is not of
    one of these layers. A quantized weight is written dequantized, in the dtype of config.json,
    and config.json no longer says that the weights are quantized.

    Args:
      folder: where to; it is created. Files of the same names are replaced.
      ckpt: of :func:`freeio_jax.hf.open`.
      layers: by number, or start of the tensors' names, as :func:`freeio_jax.hf.moe_layers` lists
        them. Their arrays must be in this process: in several processes gather them first.

    Raises:
      ValueError: the arrays are not those of the layer, or not in this process; the folder is that
        of ``ckpt``.
    """
    folder = Path(folder)
    if folder.resolve() == ckpt.folder.resolve():
        raise ValueError(f"hf.save: {folder} is the folder of the checkpoint itself: use another.")
    replaced: dict[str, np.ndarray] = {}
    for layer, weights in layers.items():
        replaced |= tensors(ckpt, layer, weights)
    folder.mkdir(parents=True, exist_ok=True)
    names_of_file: dict[str, list[str]] = {}
    for name in ckpt.names():
        names_of_file.setdefault(ckpt.file_of(name), []).append(name)
    total = 0
    for file, names in names_of_file.items():
        arrays = {n: replaced[n] if n in replaced else ckpt.tensor(n) for n in names}
        safetensors.write(folder / file, arrays)
        total += sum(array.nbytes for array in arrays.values())
    if (ckpt.folder / INDEX).is_file():
        weight_map = {n: file for file, names in names_of_file.items() for n in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    copy_other_files(ckpt, folder)


def copy_other_files(ckpt: Checkpoint, folder: Path) -> None:
    """Copies what is no weight into ``folder``: config.json, the tokenizer, texts.

    config.json does not say that weights are quantized, for they are no longer.
    """
    config = {k: v for k, v in ckpt.config.items() if k != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in ckpt.folder.iterdir():
        is_ours = path.name in (INDEX, "config.json")
        if path.suffix in _COPIED and path.is_file() and not is_ours:
            shutil.copy(path, folder)


def _together(arrays):
    """The arrays with gate and up in one, as layers have them by default."""
    arrays = dict(arrays)
    for start in ("", "shared_"):
        for end in ("", "_bias"):
            gate, up = f"{start}gate{end}", f"{start}up{end}"
            if gate in arrays and up in arrays:
                both = (arrays.pop(gate), arrays.pop(up))
                arrays[f"{start}gate_up{end}"] = jnp.concatenate(both, axis=-1)
    return arrays


def tensors(ckpt: Checkpoint, layer: int | str, weights: Weights) -> dict[str, np.ndarray]:
    """The tensors of a layer, by name, in the layouts and dtypes of ``ckpt``."""
    stored = StoredLayer(ckpt, layer)
    arrays = _together(weights.nnx)
    if arrays.keys() != stored.shapes.keys():
        raise ValueError(
            f"hf.save: layer {layer!r} must have the arrays {sorted(stored.shapes)}, but got "
            f"{sorted(arrays)}."
        )
    out: dict[str, np.ndarray] = {}
    for name, (shape, _) in stored.shapes.items():
        array = arrays[name]
        if stored.is_spread(name):
            array = array[: shape[0]]  # without the experts that are padding
        if array.shape != shape:
            raise ValueError(
                f"hf.save: {name!r} of layer {layer!r} has shape {list(array.shape)}, but by "
                f"config.json it must be {list(shape)}."
            )
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            raise ValueError(
                f"hf.save: a part of {name!r} of layer {layer!r} is in other processes. Gather it "
                "by jax.experimental.multihost_utils.process_allgather(array, tiled=True)."
            )
        array = np.asarray(array)
        for part in stored.parts(name, slice(0, shape[0])):
            piece = array[part.place]
            if stored.weight(name).transposed and piece.ndim >= 2:
                piece = np.swapaxes(piece, -1, -2)
            dtype = ckpt.stored_dtype(part.tensor)
            if ckpt.is_quantized(part.tensor):
                dtype = np.dtype(ckpt.default_dtype)
            piece = piece.reshape(ckpt.shape(part.tensor))
            out[part.tensor] = np.ascontiguousarray(piece.astype(dtype))
    return out
