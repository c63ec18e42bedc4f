"""The functional core of the MoE layers: route, dispatch, experts, combine, on any mesh."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from freeio_jax import collective
from freeio_jax.flax.experts import shared_swiglu, swiglu
from freeio_jax.flax.one_device import on_one_device
from freeio_jax.flax.router import DEFAULT_ROUTER, Router, route
from freeio_jax.layout import balanced_capacity
from freeio_jax.varying import checks_varying_axes, vary, varying_axes


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

    @classmethod
    def zeros(cls, num_experts: int) -> Report:
        """The report of a layer of E experts that was not called yet."""
        count, loss = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        return cls(jnp.zeros(num_experts, jnp.int32), count, loss, loss, loss)


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
    token_mask: jax.Array | None = None,
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
      token_mask: bool of ``x.shape[:-1]``; None: all true. A token where it is false is padding: it
        is routed nowhere, takes no room, is not counted and has no part in the losses. It is not
        looked at, so it may be NaN; its output and its gradient are zero.
      mesh: None: the current mesh (``jax.set_mesh``); without one, the mesh of the arguments'
        shardings; without that, the layer runs on one device. Where the mesh has explicit axes,
        ``jax.grad`` outside ``jit`` needs a current mesh, as for all of JAX. Axes that a
        surrounding shard_map has made manual are left as they are: x and the parameters are then
        this rank's shards. Where it leaves axes over (``axis_names=``), reverse mode computes the
        layer's forward pass again, and JAX cannot lower reverse mode over reverse mode; with
        ``check_vma=False`` there is neither limit. Over axes that are neither token nor expert axes
        the layer is replicated: each of their ranks computes the same, and what is sharded over
        them is gathered first.
      jitter_key: PRNG key for the router's jitter; None: no jitter.

    Returns:
      ``[..., H]`` and the report.

    Raises:
      ValueError: the mesh lacks an axis, shapes do not fit, or the bias is missing, with the fix.
        When it is lowered: the program is for several devices, but there is no mesh.
      TypeError: x is not floating, or token_mask not bool.
    """
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        kind = ValueError if x.ndim < 2 else TypeError
        raise kind(f"MoE: x must be floating [..., H] of two or more dimensions, got {x.aval}.")
    expected = parameters["router"].shape[0]
    if x.shape[-1] != expected:
        raise ValueError(f"MoE: x has shape {x.shape}, but the layer's width is H={expected}.")
    if bias is not None:
        parameters = {**parameters, "bias": bias}
    elif config.router.bias_update_rate is not None:
        raise ValueError(
            "MoE: bias is None, but config.router.bias_update_rate is set: give the router's bias, "
            f"float32 [{config.num_experts}], zeros at first."
        )
    if token_mask is not None:
        token_mask = _checked_mask(token_mask, x.shape[:-1])
    experts_manual = experts_are_manual(config)
    mesh = _current_mesh(config, mesh, (x, *parameters.values()))
    axes = frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)
    if not axes:
        return _shard(parameters, x, token_mask, jitter_key, config=config)
    # Compiled also where the caller is not: the exchange exists in compiled programs only.
    with jax.disable_jit(False):
        return _sharded(parameters, x, token_mask, jitter_key, config, mesh, axes, experts_manual)


def _checked_mask(token_mask, shape):
    token_mask = jnp.asarray(token_mask)
    if token_mask.dtype != jnp.bool_:
        raise TypeError(
            f"MoE: token_mask must be bool, true for real tokens, got {token_mask.dtype}. Use "
            "token_mask.astype(bool)."
        )
    if token_mask.shape != shape:
        raise ValueError(
            f"MoE: token_mask has shape {token_mask.shape}, but there is one token for each of "
            f"x.shape[:-1] = {shape}: use jnp.broadcast_to(token_mask, x.shape[:-1])."
        )
    return token_mask


def _current_mesh(config, mesh, arrays):
    current = jax.sharding.get_abstract_mesh()
    if current.manual_axes or mesh is None:
        mesh = current
    needed = config.all_token_axes
    if mesh.empty:
        mesh = _mesh_of(arrays) or mesh
        if mesh.empty or (mesh.size == 1 and not set(needed) <= set(mesh.axis_names)):
            return _mesh_of_one_device(needed, arrays)
    missing = [axis for axis in needed if axis not in mesh.axis_names]
    if missing:
        raise ValueError(
            f"MoE: the mesh has axes {tuple(mesh.axis_names)}, but not {missing}, over which the "
            f"layer spreads its experts (axis_name={config.axis_name!r}) or tokens "
            f"(token_axes={config.token_axes!r}). Change these, or the mesh: set another with "
            "jax.set_mesh, or pass it as mesh=."
        )
    return mesh


def _is_concrete(array):
    return isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)


def _mesh_of(arrays):
    """The mesh of the arrays' shardings, with its devices where one of them is not traced."""
    concrete = (a.sharding for a in arrays if _is_concrete(a))
    meshes = [sharding.mesh for sharding in concrete if isinstance(sharding, NamedSharding)]
    meshes += [jax.typeof(a).sharding.mesh for a in arrays]
    return next((mesh for mesh in meshes if not mesh.empty), None)


def _mesh_of_one_device(axes, arrays):
    shape, types = (1,) * len(axes), (AxisType.Auto,) * len(axes)
    if not jax.config.jax_disable_jit:
        return AbstractMesh(shape, axes, types)
    # A gradient is not compiled then, and has to know the device: that of an array that has one.
    devices = [device for a in arrays if _is_concrete(a) for device in a.devices()]
    devices = devices or jnp.zeros(()).devices()
    return Mesh(np.array([*devices][:1]).reshape(shape), axes, axis_types=types)


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _sharded(parameters, x, token_mask, jitter_key, config, mesh, axes, experts_manual):
    """The shard_map over ``axes``: all those that are not manual yet.

    An axis without tokens is among them, for what is inside is written for one rank: with an axis
    left to XLA, kernels would have to be partitioned.
    """
    if mesh.size == 1:
        x = on_one_device(x)
    token_axes = tuple(axis for axis in config.all_token_axes if axis in axes)
    num_shards = math.prod(mesh.shape[axis] for axis in token_axes)
    expert_axes = () if experts_manual else config.expert_axes
    over = {name: expert_axes if name in ("gate_up", "down") else () for name in parameters}
    explicit = {
        axis
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    }

    def place(array, axes):
        """``array`` with its first dimension over ``axes``, as far as JAX does not do it itself."""
        if not explicit:
            return array
        spec = PartitionSpec(tuple(axis for axis in axes if axis in explicit))
        return jax.reshard(array, NamedSharding(mesh, spec))

    shape, num_tokens = x.shape, math.prod(x.shape[:-1])
    padded = shape[0] % num_shards > 0
    if padded:
        more = -num_tokens % num_shards
        mask = jnp.ones(shape[:-1], bool) if token_mask is None else token_mask
        x = jnp.pad(place(x, ()).reshape(num_tokens, shape[-1]), ((0, more), (0, 0)))
        token_mask = jnp.pad(place(mask, ()).reshape(num_tokens), (0, more))
    tokens_spec = PartitionSpec(token_axes)
    shard = functools.partial(_shard, config=config)
    if varying_axes(x, *parameters.values()):
        # These are axes of a surrounding shard_map. JAX shards the values that a nested shard_map
        # keeps for the gradient over them once more, and cannot lower that: so this one keeps only
        # its arguments, and computes the rest again.
        shard = jax.checkpoint(shard)
    y, report = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(
            {name: PartitionSpec(axes) for name, axes in over.items()},
            tokens_spec,
            tokens_spec,
            PartitionSpec(),
        ),
        out_specs=(tokens_spec, PartitionSpec()),
        axis_names=axes,
        # Inside a shard_map without the check, no type says what varies over its axes.
        check_vma=checks_varying_axes() or not mesh.manual_axes,
    )(
        {name: place(a, over[name]) for name, a in parameters.items()},
        place(x, token_axes),
        None if token_mask is None else place(token_mask, token_axes),
        jitter_key,
    )
    if padded:
        y = place(y, ())[:num_tokens].reshape(shape)
    return y, report


def _shard(parameters, x, token_mask, jitter_key, config):
    """One rank's part."""
    token_axes = config.all_token_axes
    tokens = x.reshape(-1, x.shape[-1])
    if token_mask is not None:
        token_mask = token_mask.reshape(-1)
        tokens = _only(token_mask, tokens)
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
    if token_mask is not None:
        # The shared expert's gradient must not look at the gradient of a masked token's output.
        y = _only(token_mask, y)
    report = Report(
        load=routing.load,
        dropped=lax.psum(out.handle.num_dropped, token_axes),
        load_balance_loss=routing.load_balance_loss,
        z_loss=routing.z_loss,
        aux_loss=_auxiliary_loss(config.router, routing),
    )
    return y.reshape(x.shape), report


def _only(mask, rows):
    """``rows`` with zeros where ``mask`` is false, NaN or not; the gradient there is zero, too."""
    return jnp.where(mask[:, None], rows, jnp.zeros((), rows.dtype))


def _auxiliary_loss(router, routing):
    """The losses with their coefficients. One that is switched off adds nothing, not even NaN."""
    loss = jnp.zeros((), jnp.float32)
    if router.load_balance_coef:
        loss += router.load_balance_coef * routing.load_balance_loss
    if router.z_loss_coef:
        loss += router.z_loss_coef * routing.z_loss
    return loss


_ROUTER = ("router", "bias")
