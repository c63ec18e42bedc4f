"""MoEConfig: what an MoE layer is, apart from its parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

from freeio_jax.flax.experts import DEFAULT_EXPERTS, Experts
from freeio_jax.flax.router import DEFAULT_ROUTER, Router

#: The router's arrays. They are float32 always.
ROUTER_ARRAYS = ("router", "router_bias", "bias")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """What an MoE layer is, apart from its parameters: hashable, known at trace time.

    Attributes:
      num_experts: E; a multiple of the expert axis's size.
      top_k: K, experts of one token.
      expert_width: F, hidden width of one expert.
      router: how tokens choose their experts.
      capacity_factor: rows that a rank has room for, as a multiple of its share of an even load.
        What does not fit is dropped and reported. None: nothing is dropped.
      alignment: the rows of each expert are padded to a multiple of it.
      shared_expert_width: hidden width of an expert that sees every token; None for none.
      axis_name: mesh axis, or axes, over which the experts are spread.
      token_axes: mesh axes over which the tokens are sharded, the expert axes among them. None: the
        expert axes alone.
      dtype: of the experts' computation; None: the common dtype of input and parameters. The router
        computes in float32 always.
      exchange: a hashable object with functions ``dispatch`` and ``combine``, such as
        ``freeio_jax.reference`` or an object of ``freeio_jax.bench.baselines``. None:
        ``freeio_jax`` itself.
      experts: what the experts compute, the shared one included, and their parameters.
      shared_expert_gate: whether the shared expert's output is multiplied with
        ``sigmoid(x @ shared_expert_gate)``, one number for each token (Qwen2-MoE, Qwen3-Next).
    """

    num_experts: int
    top_k: int
    expert_width: int
    router: Router = DEFAULT_ROUTER
    capacity_factor: float | None = None
    alignment: int = 1
    shared_expert_width: int | None = None
    axis_name: str | tuple[str, ...] = "expert"
    token_axes: tuple[str, ...] | None = None
    dtype: Any = None
    exchange: Any = None
    experts: Experts = DEFAULT_EXPERTS
    shared_expert_gate: bool = False

    def __post_init__(self):
        self.router.check(self.num_experts, self.top_k)
        if not isinstance(self.experts, Experts):
            raise TypeError(
                f"MoE: experts={self.experts!r} must be an object of freeio_jax.flax.experts, such "
                "as SwiGLU() or MLP(), or of a subclass of its Experts."
            )
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

    @property
    def expert_axes(self) -> tuple[str, ...]:
        return (self.axis_name,) if isinstance(self.axis_name, str) else tuple(self.axis_name)

    @property
    def all_token_axes(self) -> tuple[str, ...]:
        return self.expert_axes if self.token_axes is None else tuple(self.token_axes)

    def parameters(self, width: int, num_experts: int | None = None) -> dict[str, Any]:
        """Shape and mesh axes of each parameter: ``{name: (shape, names)}``.

        Args:
          width: H, features of a token.
          num_experts: experts of the arrays; None: all. Inside a shard_map it is E/R.
        """
        local = self.num_experts if num_experts is None else num_experts
        axis = self.axis_name if isinstance(self.axis_name, str) else self.expert_axes
        shapes = {"router": ((width, self.num_experts), (None, None))}
        if self.router.logits_bias:
            shapes["router_bias"] = ((self.num_experts,), (None,))
        experts = self.experts.parameters(width, self.expert_width)
        own = (*ROUTER_ARRAYS, "expert_gate")  # the gate would be taken for the shared expert's
        taken = [name for name in experts if name in own or name.startswith("shared_")]
        if taken:
            raise ValueError(
                f"MoE: experts={self.experts!r} name their parameters {taken}, but the layer uses "
                f"the names {own} and those with 'shared_' itself: rename them."
            )
        for name, shape in experts.items():
            shapes[name] = ((local, *shape), (axis, *(None,) * len(shape)))
        if self.shared_expert_width is not None:
            shared = self.experts.parameters(width, self.shared_expert_width)
            for name, shape in shared.items():
                shapes[f"shared_{name}"] = (shape, (None,) * len(shape))
        if self.shared_expert_gate:
            shapes["shared_expert_gate"] = ((width, 1), (None, None))
        return shapes

    def spread_parameters(self, width: int) -> tuple[str, ...]:
        """Names of the parameters that each expert has of its own: spread over the expert axes."""
        return tuple(self.experts.parameters(width, self.expert_width))
