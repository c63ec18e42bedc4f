"""MoEConfig: what an MoE layer is, apart from its parameters."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from freeio_jax.flax.custom_router import CustomRouter
from freeio_jax.flax.experts import DEFAULT_EXPERTS, Experts
from freeio_jax.flax.partition import axes_of, entry, placed_parameters
from freeio_jax.flax.router import DEFAULT_ROUTER, Router

#: Names that the layer keeps for itself. Names that begin with "shared_" or "router_" are, too.
_OWN_NAMES = ("router", "bias", "expert_gate")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """What an MoE layer is, apart from its parameters: hashable, known at trace time.

    Attributes:
      num_experts: E; a multiple of the expert axis's size, or see ``pad_experts_to``.
      top_k: K, experts of one token.
      expert_width: F, hidden width of one expert.
      router: how tokens choose their experts: a :class:`Router`, or an object of a subclass of
        :class:`CustomRouter`.
      capacity_factor: rows that a rank has room for, as a multiple of its share of an even load.
        What does not fit is dropped and reported. None: nothing is dropped. In MaxText a factor of
        this meaning is ``ragged_buffer_factor``; ``capacity_factor`` there, and in many other
        libraries, is the room of one expert (for one sequence).
      alignment: the rows of each expert are padded to a multiple of it.
      shared_expert_width: hidden width of an expert that sees every token; None for none.
      axis_name: mesh axis, or axes, over which the experts are spread.
      token_axes: mesh axes over which the tokens are sharded, the expert axes among them. None: the
        expert axes alone.
      dtype: of the experts' computation; None: the common dtype of input and parameters. The router
        computes in float32 always.
      exchange: a hashable object with functions ``dispatch`` and ``combine``, such as
        ``freeio_jax.reference`` or an object of ``freeio_jax.bench.baselines``. Its handles have
        ``has_row()``, as :class:`freeio_jax.Handle`. None: ``freeio_jax`` itself.
      experts: what the experts compute, the shared one included, and their parameters.
      shared_expert_gate: whether the shared expert's output is multiplied with
        ``sigmoid(x @ shared_expert_gate)``, one number for each token (Qwen2-MoE, Qwen3-Next).
      num_zero_experts: Z, experts that return their input (LongCat-Flash's "zero experts",
        arXiv:2509.01322). They have no parameters, and their tokens are not exchanged. The router
        chooses among E + Z experts. The zero experts are the last ones: the ids ``E, ..., E+Z-1``.
      pad_experts_to: P, first dimension of the experts' parameters; None: E. For E that the ranks
        do not divide: 60 experts run on 8 ranks with P = 64. The experts from E on exist in the
        parameters alone. No token reaches them, they have no rows, and their gradients are zero.
        P does not depend on the mesh, so parameters fit every mesh whose expert axis divides P.
      router_width: W, features of the router's input; None: H. For a layer that is called with
        ``router_input=``.
      drops: which assignments are dropped where a rank has not enough room. ``"evenly"``: every
        n-th one in packed order, so that each expert and each source rank loses the same share
        (:mod:`freeio_jax.flax.drops`). It costs one all-gather of E int32 over the expert axes, and
        a sort of a rank's T*K ids, unless there is room for all. ``"last"``: the last ones in
        packed order, so the last experts of the rank lose all first, and of one expert the last
        source ranks. It costs nothing.
      fsdp_axes: mesh axes, of ``token_axes`` but not the expert axes, over which the matrices of
        the experts and of the shared expert are sharded as well. They are gathered where they are
        used; their gradients are reduced and scattered. () for none.
      model_axes: mesh axes without tokens over which the hidden widths of the experts and of the
        shared expert are split (tensor parallelism). The ranks' outputs are summed for each token.
        ``SwiGLU`` must be ``separate`` or ``interleaved`` then. () for none.
      overlap: whether exchanges run beside compute, forward and backward. The shared expert runs
        beside the combine. In the backward pass the experts' weights' gradients run beside the
        exchange that brings the tokens' gradient back. With chunks, the experts of one chunk run
        beside the exchanges of its neighbours. Such an exchange takes ``overlap_num_sms`` of a
        GPU's multiprocessors (:func:`freeio_jax.config`). An exchange with nothing beside it takes
        all that it may, and so do all where this is False. The default is False because within a
        host it has not been shown to pay (``docs/overlap.md``). An ``exchange`` without
        ``dispatch_start`` and ``combine_start`` is synchronous.
      num_chunks: n, the number of chunks that the tokens of a rank are cut into. Their sizes differ
        by one at most. While the experts multiply one chunk, the next is dispatched, and the one
        before is combined. The room of ``capacity_factor`` is that of each chunk, so more may be
        dropped. Otherwise the result is that of one chunk, but for rounding. Chunks need less
        memory, and pay where the exchange is a large part of the layer. Products of fewer rows are
        slower for each row.
      expert_capacity: rows of one expert for one sequence, that is, for the L tokens of
        ``x[..., L, H]``. It takes them in order of token, then of k, and what exceeds it is
        dropped. None: no such bound. Switch Transformers have one. So has MaxText, as
        ``capacity_factor``, a multiple of ``L*K/E``. It costs a sort of each sequence's ids. A
        sequence stays on one rank, and whole sequences are padded. So the first dimension of x
        should be a multiple of the ranks that hold tokens: otherwise some ranks have less to do.
    """

    num_experts: int
    top_k: int
    expert_width: int
    router: Router | CustomRouter = DEFAULT_ROUTER
    capacity_factor: float | None = None
    alignment: int = 1
    shared_expert_width: int | None = None
    axis_name: str | tuple[str, ...] = "expert"
    token_axes: tuple[str, ...] | None = None
    dtype: Any = None
    exchange: Any = None
    experts: Experts = DEFAULT_EXPERTS
    shared_expert_gate: bool = False
    num_zero_experts: int = 0
    pad_experts_to: int | None = None
    router_width: int | None = None
    drops: str = "evenly"
    fsdp_axes: tuple[str, ...] = ()
    model_axes: tuple[str, ...] = ()
    overlap: bool = False
    num_chunks: int = 1
    expert_capacity: int | None = None

    def __post_init__(self):
        if not isinstance(self.router, (Router, CustomRouter)):
            raise TypeError(
                f"MoE: router={self.router!r} must be a freeio_jax.flax.Router, or an object of a "
                "subclass of freeio_jax.flax.CustomRouter."
            )
        if self.num_zero_experts < 0:
            raise ValueError(f"MoE: num_zero_experts={self.num_zero_experts} is negative.")
        self.router.check(self.num_choices, self.top_k)
        if not isinstance(self.experts, Experts):
            raise TypeError(
                f"MoE: experts={self.experts!r} must be an object of freeio_jax.flax.experts, such "
                "as SwiGLU() or MLP(), or of a subclass of its Experts."
            )
        if self.num_slots < self.num_experts:
            raise ValueError(
                f"MoE: pad_experts_to={self.pad_experts_to} is less than "
                f"num_experts={self.num_experts}. Use None for parameters of num_experts experts."
            )
        if self.drops not in ("last", "evenly"):
            raise ValueError(f"MoE: drops must be 'last' or 'evenly', got {self.drops!r}.")
        for field in ("overlap", "shared_expert_gate"):
            value = getattr(self, field)
            if not isinstance(value, (bool, np.bool_)):
                raise TypeError(f"MoE: {field} must be True or False, got {value!r}.")
        for field, or_none in (("num_chunks", ""), ("expert_capacity", ", or None")):
            value = getattr(self, field)
            if or_none and value is None:
                continue
            if _whole_number(value) < 1:
                raise ValueError(
                    f"MoE: {field} must be an int of at least 1{or_none}, got {value!r}."
                )
            object.__setattr__(self, field, _whole_number(value))
        if self.shared_expert_gate and self.shared_expert_width is None:
            raise ValueError(
                "MoE: shared_expert_gate=True, but there is no shared expert: give "
                "shared_expert_width."
            )
        missing = [axis for axis in self.expert_axes if axis not in self.all_token_axes]
        if missing:
            raise ValueError(
                f"MoE: token_axes={self.token_axes!r} lack {missing}, over which the experts are "
                "spread. Each rank dispatches tokens of its own: add the expert axes to token_axes."
            )
        self._check_partition()

    def _check_partition(self):
        for field in ("fsdp_axes", "model_axes"):
            axes = getattr(self, field)
            if not isinstance(axes, tuple):
                raise TypeError(f"MoE: {field} must be a tuple of mesh axes, got {axes!r}.")
        allowed = [axis for axis in self.all_token_axes if axis not in self.expert_axes]
        wrong = [axis for axis in self.fsdp_axes if axis not in allowed]
        if wrong:
            raise ValueError(
                f"MoE: fsdp_axes={self.fsdp_axes!r} have {wrong}, but may only have axes of "
                f"token_axes that are no expert axes: {allowed}. Ranks with equal tokens would "
                "compute equal gradients. Add the axes to token_axes, or leave them out."
            )
        shared = [axis for axis in self.model_axes if axis in self.all_token_axes]
        if shared:
            raise ValueError(
                f"MoE: model_axes={self.model_axes!r} have {shared}, over which the tokens are "
                "sharded. Ranks that split F work on the same tokens: use another mesh axis."
            )
        if self.model_axes and self.experts.added_once() is None:
            raise ValueError(
                f"MoE: model_axes={self.model_axes!r} split the experts' width, but "
                f"experts={self.experts!r} cannot be split so. Use SwiGLU(separate=True) or "
                "SwiGLU(interleaved=True), MLP(), or a class with added_once()."
            )

    @property
    def num_choices(self) -> int:
        """E + Z: experts among which the router chooses."""
        return self.num_experts + self.num_zero_experts

    @property
    def num_slots(self) -> int:
        """P: experts of the parameters, those included that no token reaches."""
        return self.num_experts if self.pad_experts_to is None else self.pad_experts_to

    @property
    def expert_axes(self) -> tuple[str, ...]:
        return (self.axis_name,) if isinstance(self.axis_name, str) else tuple(self.axis_name)

    @property
    def all_token_axes(self) -> tuple[str, ...]:
        return self.expert_axes if self.token_axes is None else tuple(self.token_axes)

    def router_parameters(self, width: int) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter of the router, by name. They are float32 always.

        Args:
          width: H, features of a token.
        """
        width = width if self.router_width is None else self.router_width
        shapes = self.router.parameters(width, self.num_choices)
        if isinstance(self.router, Router):
            return shapes
        if "bias" in shapes and self.router.bias_update_rate is not None:
            raise ValueError(
                f"MoE: router={self.router!r} names a parameter 'bias', but with bias_update_rate "
                "this is the name of the bias on the choice: rename the parameter."
            )
        return {f"router_{name}": shape for name, shape in shapes.items()}

    def parameters(self, width: int, shards: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Shape and mesh axes of each parameter: ``{name: (shape, names)}``.

        An entry of ``names`` is that of a PartitionSpec: an axis, a tuple of axes, or None.

        Args:
          width: H, features of a token.
          shards: sizes of the manual axes of a surrounding shard_map, in which arrays are shards;
            None: there is none.
        """
        shapes = {
            name: (shape, (None,) * len(shape))
            for name, shape in self.router_parameters(width).items()
        }
        experts = self.experts.parameters(width, self.expert_width)
        taken = [
            name
            for name in experts
            # The expert_gate would be taken for the shared expert's.
            if name in _OWN_NAMES or name.startswith(("shared_", "router_"))
        ]
        if taken:
            raise ValueError(
                f"MoE: experts={self.experts!r} name their parameters {taken}, but the layer uses "
                f"the names {_OWN_NAMES} and those with 'shared_' or 'router_' itself: rename them."
            )
        axes = {"fsdp_axes": self.fsdp_axes, "model_axes": self.model_axes}
        placed = placed_parameters(self.experts, width, self.expert_width, **axes)
        for name, (shape, names) in placed.items():
            shapes[name] = ((self.num_slots, *shape), (entry(self.expert_axes), *names))
        if self.shared_expert_width is not None:
            shared = placed_parameters(self.experts, width, self.shared_expert_width, **axes)
            shapes.update({f"shared_{name}": placed for name, placed in shared.items()})
        if self.shared_expert_gate:
            shapes["shared_expert_gate"] = ((width, 1), (None, None))
        return {
            name: (_shard_shape(shape, names, shards or {}), names)
            for name, (shape, names) in shapes.items()
        }

    def spread_parameters(self, width: int) -> tuple[str, ...]:
        """Names of the parameters that each expert has of its own: spread over the expert axes."""
        return tuple(self.experts.parameters(width, self.expert_width))


def _whole_number(value) -> int:
    """The int that ``value`` is; 0: it is none. A bool is none."""
    try:
        # A tracer has __index__ as well. It raises a TypeError.
        return 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return 0


def _shard_shape(shape, names, sizes):
    """The shape of a shard where the axes in ``sizes`` are manual."""
    counts = (math.prod(sizes.get(axis, 1) for axis in axes_of(over)) for over in names)
    return tuple(size // count for size, count in zip(shape, counts, strict=True))
