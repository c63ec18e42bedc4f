"""The functional core of the MoE layers: route, dispatch, experts, combine, on any mesh."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from freeio_jax import collective
from freeio_jax.flax.experts import shared_swiglu, swiglu
from freeio_jax.flax.router import DEFAULT_ROUTER, Router, route
from freeio_jax.layout import balanced_capacity
from freeio_jax.varying import vary


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """What an MoE layer is, apart from its parameters: hashable, known at trace time.

    Attributes:
      num_experts: E; a multiple of the expert axis's size.
      top_k: K, experts of one token.
      expert_width: F, hidden width of one expert.
      router: how tokens choose their experts.
      capacity_factor: rows that a rank has room for, as a multiple of its share were the load even;
        what does not fit is dropped and reported. None: nothing is ever dropped.
      alignment: the rows of each expert are padded to a multiple of it.
      shared_expert_width: hidden width of an expert that sees every token; None for none.
      axis_name: mesh axis, or axes, over which the experts are spread.
      token_axes: mesh axes over which the tokens are sharded, the expert axes among them. None: the
        expert axes alone.
      dtype: of the experts' computation; None: the common dtype of input and parameters. The router
        computes in float32 always.
      exchange: what has the functions ``dispatch`` and ``combine``: ``freeio_jax.reference``, say,
        or an object of ``freeio_jax.bench.baselines``; hashable. None: ``freeio_jax`` itself.
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

    def __post_init__(self):
        self.router.check(self.num_experts, self.top_k)
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
        shapes = {
            "router": ((width, self.num_experts), (None, None)),
            "gate_up": ((local, width, 2 * self.expert_width), (axis, None, None)),
            "down": ((local, self.expert_width, width), (axis, None, None)),
        }
        if self.shared_expert_width is not None:
            shared = self.shared_expert_width
            shapes["shared_gate_up"] = ((width, 2 * shared), (None, None))
            shapes["shared_down"] = ((shared, width), (None, None))
        return shapes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """What one call of an MoE layer has to say, over all shards; equal on all of them.

    Attributes:
      load: int32 ``[E]``: assignments to each expert, before any drop.
      dropped: int32 scalar: assignments that did not fit in the capacity.
      load_balance_loss: float32 scalar, without its coefficient; 1 where even.
      z_loss: float32 scalar, without its coefficient.
      aux_loss: float32 scalar to add to the training loss: both losses with their coefficients.
    """

    load: jax.Array
    dropped: jax.Array
    load_balance_loss: jax.Array
    z_loss: jax.Array
    aux_loss: jax.Array


def per_expert(init: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """An initializer for ``[experts, ...]`` that draws each expert's matrix on its own."""

    def stacked(key, shape, dtype):
        draw = functools.partial(init, shape=shape[1:], dtype=dtype)
        return jax.vmap(lambda key: draw(key))(jax.random.split(key, shape[0]))

    return stacked


def experts_are_manual(config: MoEConfig) -> bool:
    """Whether this is traced inside a shard_map over the expert axes, so parameters are shards."""
    manual = set(jax.sharding.get_abstract_mesh().manual_axes)
    inside = [axis for axis in config.expert_axes if axis in manual]
    if inside and len(inside) < len(config.expert_axes):
        raise ValueError(
            f"MoE: of axis_name={config.axis_name!r} only {inside} are manual axes of the "
            "surrounding shard_map. Make all of them manual, or none."
        )
    return bool(inside)


def moe(
    parameters: dict[str, jax.Array],
    x: jax.Array,
    config: MoEConfig,
    *,
    bias: jax.Array | None = None,
    mesh: jax.sharding.Mesh | AbstractMesh | None = None,
    jitter_key: jax.Array | None = None,
) -> tuple[jax.Array, Report]:
    """Evaluates an MoE layer.

    Args:
      parameters: arrays by the names and shapes of ``config.parameters(H)``.
      x: ``[..., H]``, floating, at least two dimensions. The first is sharded over the token axes;
        where it does not divide evenly, all tokens together are padded until they do.
      config: the layer.
      bias: float32 ``[E]`` of the router; needed where ``config.router.bias_update_rate`` is set.
      mesh: None: the current mesh (``jax.set_mesh``). Axes that a surrounding shard_map has made
        manual are left as they are: x and the parameters are then this rank's shards. Without any
        mesh the layer runs on one device.
      jitter_key: PRNG key for the router's jitter; None: no jitter.

    Returns:
      ``[..., H]`` and the report.

    Raises:
      ValueError: the mesh lacks an axis, shapes do not fit, or the bias is missing, with the fix.
      TypeError: x is not floating.
    """
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        kind = ValueError if x.ndim < 2 else TypeError
        raise kind(f"MoE: x must be floating [..., H] of two or more dimensions, got {x.aval}.")
    expected = parameters["router"].shape[0]
    if x.shape[-1] != expected:
        raise ValueError(f"MoE: x has shape {x.shape}, but the layer's width is H={expected}.")
    experts_manual = experts_are_manual(config)
    mesh = _current_mesh(config, mesh)
    axes = tuple(a for a in config.all_token_axes if a not in mesh.manual_axes)
    if bias is not None:
        parameters = {**parameters, "bias": bias}
    elif config.router.bias_update_rate is not None:
        raise ValueError(
            "MoE: bias is None, but config.router.bias_update_rate is set: give the router's bias, "
            f"float32 [{config.num_experts}], zeros at first."
        )
    if not axes:
        return _shard(parameters, x, jitter_key, config, num_tokens=None, axes=())
    return _sharded(parameters, x, jitter_key, config, mesh, axes, experts_manual)


def _current_mesh(config, mesh):
    current = jax.sharding.get_abstract_mesh()
    if current.manual_axes or mesh is None:
        mesh = current
    if mesh.empty:
        axes = config.all_token_axes
        return AbstractMesh((1,) * len(axes), axes, axis_types=(AxisType.Auto,) * len(axes))
    missing = [axis for axis in config.all_token_axes if axis not in mesh.axis_names]
    if missing:
        raise ValueError(
            f"MoE: the mesh has axes {tuple(mesh.axis_names)}, but not {missing}, over which the "
            f"layer spreads its experts (axis_name={config.axis_name!r}) or tokens "
            f"(token_axes={config.token_axes!r}). Change these, or the mesh."
        )
    return mesh


# Jitted also where the caller does not: the exchange exists in compiled programs only.
@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _sharded(parameters, x, jitter_key, config, mesh, axes, experts_manual):
    """The shard_map over those token axes that are not manual yet."""
    num_shards = math.prod(mesh.shape[axis] for axis in axes)
    expert_spec = PartitionSpec() if experts_manual else PartitionSpec(config.expert_axes)
    specs = {
        name: expert_spec if name in ("gate_up", "down") else PartitionSpec() for name in parameters
    }
    explicit = any(t == AxisType.Explicit for t in mesh.axis_types)

    def place(array, spec):
        return jax.reshard(array, NamedSharding(mesh, spec)) if explicit else array

    shape, num_tokens = x.shape, None
    if shape[0] % num_shards:
        num_tokens = math.prod(shape[:-1])
        x = place(x, PartitionSpec()).reshape(num_tokens, shape[-1])
        x = jnp.pad(x, ((0, -num_tokens % num_shards), (0, 0)))
    x_spec = PartitionSpec(axes)
    y, report = jax.shard_map(
        functools.partial(_shard, config=config, num_tokens=num_tokens, axes=axes),
        mesh=mesh,
        in_specs=(specs, x_spec, PartitionSpec()),
        out_specs=(x_spec, PartitionSpec()),
        axis_names=set(axes),
    )({name: place(a, specs[name]) for name, a in parameters.items()}, place(x, x_spec), jitter_key)
    if num_tokens is not None:
        y = place(y, PartitionSpec())[:num_tokens].reshape(shape)
    return y, report


def _shard(parameters, x, jitter_key, config, num_tokens, axes):
    """One rank's part. ``num_tokens``: of all ranks of ``axes`` where the last ones are padding."""
    token_axes = config.all_token_axes
    tokens = x.reshape(-1, x.shape[-1])
    token_mask = None
    if num_tokens is not None:
        first = lax.axis_index(axes) * tokens.shape[0]
        token_mask = first + jnp.arange(tokens.shape[0]) < num_tokens
    if jitter_key is not None:
        jitter_key = jax.random.fold_in(jitter_key, lax.axis_index(token_axes))
    # Before any cast, so that gradients are summed over the ranks in the parameters' dtype.
    parameters = {name: vary(a, token_axes) for name, a in parameters.items()}
    routing = route(
        tokens,
        parameters["router"],
        top_k=config.top_k,
        router=config.router,
        bias=parameters.get("bias"),
        token_mask=token_mask,
        token_axes=token_axes,
        jitter_key=jitter_key,
    )
    dtype = config.dtype or jnp.result_type(tokens, parameters["gate_up"], parameters["down"])
    tokens = tokens.astype(dtype)
    weights = {name: a.astype(dtype) for name, a in parameters.items() if name not in _ROUTER}
    capacity = None
    if config.capacity_factor is not None:
        capacity = balanced_capacity(
            config.capacity_factor,
            num_ranks=lax.axis_size(config.expert_axes),
            num_tokens=tokens.shape[0],
            top_k=config.top_k,
            num_experts=config.num_experts,
            alignment=config.alignment,
        )
    exchange = config.exchange or collective
    out = exchange.dispatch(
        tokens,
        routing.topk_idx,
        num_experts=config.num_experts,
        axis_name=config.expert_axes,
        capacity=capacity,
        alignment=config.alignment,
    )
    rows = swiglu(out.tokens, weights["gate_up"], weights["down"], out.group_sizes)
    y = exchange.combine(rows, out.handle, routing.topk_weights)
    if config.shared_expert_width is not None:
        y = y + shared_swiglu(tokens, weights["shared_gate_up"], weights["shared_down"])
    router = config.router
    report = Report(
        load=routing.load,
        dropped=lax.psum(out.handle.num_dropped, token_axes),
        load_balance_loss=routing.load_balance_loss,
        z_loss=routing.z_loss,
        aux_loss=router.load_balance_coef * routing.load_balance_loss
        + router.z_loss_coef * routing.z_loss,
    )
    return y.reshape(x.shape), report


_ROUTER = ("router", "bias")
