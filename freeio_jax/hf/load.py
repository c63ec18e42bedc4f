"""From the tensors of a checkpoint to the parameters of an MoE layer, sharded over a mesh."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from freeio_jax.flax import nnx
from freeio_jax.flax.mesh import check_divides
from freeio_jax.hf.checkpoint import Checkpoint
from freeio_jax.hf.family import BASES, Weight
from freeio_jax.hf.options import family_of, moe_config


@dataclasses.dataclass(frozen=True)
class Weights:
    """The arrays of one MoE layer.

    Attributes:
      parameters: by name, as ``MoEConfig.parameters`` has them.
      bias: float32 ``[E]``, the router's bias on the choice; None where the family has none.
    """

    parameters: dict[str, jax.Array]
    bias: jax.Array | None = None

    @property
    def linen(self) -> dict[str, dict[str, jax.Array]]:
        """The variables for ``apply``: ``layer.apply(weights.linen, x)``."""
        state = {} if self.bias is None else {"router_state": {"bias": self.bias}}
        return {"params": dict(self.parameters), **state}

    @property
    def nnx(self) -> dict[str, jax.Array]:
        """The state for an nnx layer: ``nnx.update(layer, weights.nnx)``."""
        return self.parameters | ({} if self.bias is None else {"bias": self.bias})

    @classmethod
    def of_linen(cls, variables: Mapping[str, Any]) -> Weights:
        """Those of a linen layer's variables: ``{"params": ..., "router_state": ...}``."""
        variables = nn.meta.unbox(variables)
        return cls(dict(variables["params"]), variables.get("router_state", {}).get("bias"))

    @classmethod
    def of_nnx(cls, layer: nnx.MoE) -> Weights:
        """Those of an nnx layer."""
        bias = getattr(layer, "bias", None)
        names = layer.config.parameters(layer.width)
        return cls(
            {name: getattr(layer, name)[...] for name in names},
            None if bias is None else bias[...],
        )


def moe_layers(ckpt: Checkpoint) -> tuple[int | str, ...]:
    """The decoder layers that have an MoE block, as :func:`load_moe` takes them.

    Layers outside the decoder, such as those that predict further tokens, come as the start of
    their tensors' names.
    """
    family = family_of(ckpt.config)
    starts = {
        name.removesuffix(family.router_tensor): None
        for name in ckpt.names()
        if name.endswith(f".{family.router_tensor}") and not name.startswith(family.other_models)
    }
    numbers = {}
    for base in BASES:
        before, after = (base + family.layer).split("{layer}")
        for start in starts:
            number = start.removeprefix(before).removesuffix(after)
            if start == f"{before}{number}{after}" and number.isdecimal():
                numbers[start] = int(number)
    ordered = sorted(numbers.values())
    return (*ordered, *sorted(start.rstrip(".") for start in starts if start not in numbers))


def load_moe(
    ckpt: Checkpoint,
    layer: int | str,
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    **options: Any,
) -> Weights:
    """Loads the parameters of one MoE layer.

    Each device gets its own experts. A process reads the tensors of its devices' experts only, one
    device after the other. Router and shared expert are replicated.

    Args:
      ckpt: of :func:`freeio_jax.hf.open`.
      layer: the number of the decoder layer, or the start of its tensors' names
        (``"mtp.layers.0"``); :func:`moe_layers` lists them.
      mesh: None: the current mesh (``jax.set_mesh``); without one, the default device.
      dtype: of the experts' parameters; None: the ``dtype`` of config.json, else bfloat16. The
        router's arrays are float32 always.
      options: the options with which the layer was made, as far as its parameters and their
        placement depend on them: ``axis_name``, say.

    Raises:
      ValueError: the layer has no MoE block; a tensor is missing or has another shape than the
        configuration asks for; the experts do not divide among the ranks; the family cannot be
        expressed.
    """
    stored = StoredLayer(ckpt, layer, **options)
    mesh = jax.sharding.get_mesh() if mesh is None else mesh
    check_divides(stored.config, mesh, stored.width)
    dtype = np.dtype(ckpt.default_dtype if dtype is None else dtype)
    arrays = {
        name: _sharded(stored, name, mesh, np.dtype(np.float32) if is_of_router(name) else dtype)
        for name in stored.shapes
    }
    return Weights(arrays, arrays.pop("bias", None))


def is_of_router(name: str) -> bool:
    """Whether a parameter is the router's. These are float32 always, and replicated."""
    return name == "bias" or name.startswith("router")


def tensors_of_layer(ckpt: Checkpoint, layer: int | str) -> tuple[str, ...]:
    """The names of the tensors that :func:`load_moe` reads for a layer, each once."""
    stored = StoredLayer(ckpt, layer)
    names = [
        part.tensor
        for name, (shape, _) in stored.shapes.items()
        for part in stored.parts(name, slice(0, shape[0]))
    ]
    return tuple(dict.fromkeys(names))


class StoredLayer:
    """Where the parameters of one MoE layer are in a checkpoint.

    Attributes:
      ckpt: the checkpoint.
      config: of the layer.
      width: H.
      shapes: shape and mesh axes of each parameter, and of ``"bias"``.
      start: what the names of the layer's tensors begin with.
    """

    def __init__(self, ckpt: Checkpoint, layer: int | str, **options: Any):
        family = family_of(ckpt.config)
        self.ckpt, self._weights = ckpt, family.weights
        self._has_own_experts = family.experts is not None
        self.width, self.config = moe_config(ckpt.config, layer, **options)
        self.start = self._find_start(family, layer)
        self.shapes = dict(self.config.parameters(self.width))
        if self.config.router.bias_update_rate is not None:
            self.shapes["bias"] = (self.shapes["router"][0][-1:], (None,))

    def _find_start(self, family, layer):
        if isinstance(layer, str):
            starts = [layer.removesuffix(".") + "."]
        else:
            starts = [base + family.layer.format(layer=layer) for base in BASES]
        for start in starts:
            if start + family.router_tensor in self.ckpt:
                return start
        raise ValueError(
            f"hf: layer {layer!r} of {self.ckpt.folder} has no MoE block: there is no tensor "
            f"{starts[0] + family.router_tensor!r}. Layers with one are "
            f"{list(moe_layers(self.ckpt))}."
        )

    def weight(self, name: str) -> Weight:
        """Where a parameter is: the alternative whose tensors exist, and have the right shape.

        Where none is right it is the first whose first tensor exists, for the error to be about it.

        Raises:
          ValueError: the shape does not tell which way round a tensor is.
        """
        alternatives = self._weights.get(name) or self._halves(name)
        found = [w for w in alternatives if self._first_tensor(w) in self.ckpt]
        if len(found) < 2:
            return (found or alternatives)[0]
        fits = []
        for weight in found:
            part = next(self.parts(name, slice(0, 1), weight))
            if self.ckpt.shape(part.tensor) == part.whole:
                fits.append(weight)
        if len(fits) > 1:
            raise ValueError(
                f"hf: by its shape {list(part.whole)} the tensor {part.tensor!r} may have its "
                "inputs or its outputs first. Files of this family have either, so it cannot be "
                "loaded."
            )
        return (fits or found)[0]

    def _first_tensor(self, weight):
        return self.start + weight.names[0].format(expert=0)

    def _halves(self, name: str) -> tuple[Weight, ...]:
        """Where gate or up is that the files have together, for ``SwiGLU(separate=True)``."""
        halves = ("gate", "up")
        if name.removeprefix("shared_") not in halves or self._has_own_experts:
            raise ValueError(
                f"hf: the layer has a parameter {name!r}, but the family's files have "
                f"{sorted(self._weights)} alone. Load it with the experts of "
                "hf.moe_options(config). SwiGLU(separate=True) is possible instead of SwiGLU()."
            )
        which = halves.index(name.removeprefix("shared_"))
        both = self._weights["shared_gate_up" if name.startswith("shared_") else "gate_up"]
        return tuple(
            dataclasses.replace(weight, half=which)
            if len(weight.names) == 1
            else dataclasses.replace(weight, names=weight.names[which : which + 1])
            for weight in both
        )

    def is_spread(self, name: str) -> bool:
        """Whether each expert has a parameter of its own: not those of router or shared expert."""
        return not is_of_router(name) and not name.startswith("shared_")

    def parts(self, name: str, experts: slice, weight: Weight | None = None) -> Iterator[Part]:
        """The pieces of tensors that make up ``experts`` of a parameter.

        A parameter that is replicated is made up as a whole. Experts that are only padding are in
        no tensor.

        Args:
          name: of the parameter.
          experts: which of them.
          weight: where the parameter is; None: :meth:`weight` finds it.
        """
        weight, (shape, _) = weight or self.weight(name), self.shapes[name]
        spread = self.is_spread(name)
        matrix = shape[1:] if spread else shape
        num_experts = self.config.num_experts
        experts = slice(*(min(e, num_experts) for e in (experts.start, experts.stop)))
        count = experts.stop - experts.start
        width = matrix[-1] // len(weight.names)
        for i, tensor in enumerate(weight.names):
            columns = slice(i * width, (i + 1) * width)
            taken = slice(0, width)
            if weight.half is not None:
                taken = slice(weight.half * width, (weight.half + 1) * width)
            piece = (*matrix[:-1], width if weight.half is None else 2 * width)
            if weight.transposed and len(piece) == 2:
                piece = piece[::-1]
            if "{expert}" in tensor:
                for expert in range(experts.start, experts.stop):
                    full, place = tensor.format(expert=expert), expert - experts.start
                    yield Part(self.start + full, piece, None, piece, taken, (place, ..., columns))
                continue
            full = self.start + tensor
            if not spread:
                yield Part(full, piece, None, piece, taken, (..., columns))
            elif count and weight.flat:
                rows = slice(experts.start * piece[0], experts.stop * piece[0])
                whole, place = (num_experts * piece[0], *piece[1:]), (slice(count), ..., columns)
                yield Part(full, whole, rows, (count, *piece), taken, place)
            elif count:
                whole, place = (num_experts, *piece), (slice(count), ..., columns)
                yield Part(full, whole, experts, (count, *piece), taken, place)

    def read(self, name: str, experts: slice, dtype: np.dtype) -> np.ndarray:
        """``experts`` of a parameter, or all of a replicated one. Padding is zero."""
        shape, _ = self.shapes[name]
        if self.is_spread(name):
            shape = (experts.stop - experts.start, *shape[1:])
        out = np.zeros(shape, dtype)
        transposed = self.weight(name).transposed
        for part in self.parts(name, experts):
            self._check(part)
            tensor = self.ckpt.tensor(part.tensor, part.rows, dtype).reshape(part.shape)
            if transposed and tensor.ndim >= 2:
                tensor = np.swapaxes(tensor, -1, -2)
            out[part.place] = tensor[..., part.columns]
        return out

    def faults(self) -> list[str]:
        """What is wrong with the layer's tensors, by their headers."""
        found = []
        for name, (shape, _) in self.shapes.items():
            for part in self.parts(name, slice(0, shape[0])):
                try:
                    self._check(part)
                except ValueError as error:
                    found.append(str(error))
        return found

    def _check(self, part):
        got = self.ckpt.shape(part.tensor)
        # Ernie's bias is [1, E].
        if got != part.whole and got != (1, *part.whole):
            raise ValueError(
                f"hf: the tensor {part.tensor!r} of {self.ckpt.file_of(part.tensor)} has shape "
                f"{list(got)}, but by config.json it must be {list(part.whole)}. Is config.json "
                f"that of these files?"
            )
        self.ckpt.check_complete(part.tensor)


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a tensor, and its place in a parameter.

    Attributes:
      tensor: its name.
      whole: the tensor's shape.
      rows: which of its first dimension; None: all.
      shape: of the piece as it is read, with a dimension for the experts if there are several.
      columns: which of the piece's columns belong to the parameter.
      place: where they go, an index.
    """

    tensor: str
    whole: tuple[int, ...]
    rows: slice | None
    shape: tuple[int, ...]
    columns: slice
    place: tuple


def _sharded(stored: StoredLayer, name: str, mesh: Mesh, dtype: np.dtype) -> jax.Array:
    shape, names = stored.shapes[name]
    if mesh.empty:
        return jnp.asarray(stored.read(name, slice(0, shape[0]), dtype))
    sharding = NamedSharding(mesh, PartitionSpec(*names))

    def experts_of(index):
        """The first expert and the end; of a parameter without experts of its own all rows."""
        if not stored.is_spread(name):
            return 0, shape[0]
        return index[0].indices(shape[0])[:2]

    # Devices that differ in other axes need the same experts. They are read once, and kept until
    # the last of these devices has them.
    indices = sharding.addressable_devices_indices_map(shape).values()
    left = collections.Counter(experts_of(index) for index in indices)
    kept = {}

    def read(index):
        experts = experts_of(index)
        if experts not in kept:
            kept[experts] = stored.read(name, slice(*experts), dtype)
        left[experts] -= 1
        array = kept.pop(experts) if left[experts] <= 0 else kept[experts]
        return array[:, *index[1:]] if stored.is_spread(name) else array[index]

    return jax.make_array_from_callback(shape, sharding, read, dtype=dtype)
