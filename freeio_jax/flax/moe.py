"""The functional core of the MoE layers: route, dispatch, experts, combine, on any mesh."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from freeio_jax import collective
from freeio_jax.flax.config import MoEConfig
from freeio_jax.flax.mesh import current_mesh, experts_are_manual
from freeio_jax.flax.one_device import on_one_device
from freeio_jax.flax.router import route
from freeio_jax.layout import balanced_capacity, dropless_capacity
from freeio_jax.varying import checks_varying_axes, vary, varying_axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """What one call of an MoE layer reports: of all shards together, equal on all of them.

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
        """The report of a layer of E experts before its first call."""
        count, loss = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        return cls(jnp.zeros(num_experts, jnp.int32), count, loss, loss, loss)


def initializer(kernel_init: Callable[..., jax.Array], names: tuple) -> Callable[..., jax.Array]:
    """How a parameter starts whose dimensions lie over ``names`` (of ``config.parameters``).

    A matrix is drawn by ``kernel_init``, for each expert on its own; a vector is zero.
    """
    of_experts = names[0] is not None
    if len(names) - of_experts < 2:
        return jax.nn.initializers.zeros
    return _per_expert(kernel_init) if of_experts else kernel_init


def _per_expert(init):
    """An initializer for ``[experts, ...]`` that draws each expert's array on its own."""

    def stacked(key, shape, dtype):
        draw = functools.partial(init, shape=shape[1:], dtype=dtype)
        return jax.vmap(lambda key: draw(key))(jax.random.split(key, shape[0]))

    return stacked


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
      bias: float32 ``[E]`` of the router, where ``config.router.bias_update_rate`` is set and only
        there.
      token_mask: bool of ``x.shape[:-1]``; None: all true. A token where it is false is padding. It
        is routed nowhere, takes no room, is not counted and has no part in the losses. It may be
        NaN. Its output and its gradient are zero.
      mesh: None: the current mesh (``jax.set_mesh``); without one, the mesh of the arguments'
        shardings; without that, the layer runs on one device. Where the mesh has explicit axes,
        ``jax.grad`` outside ``jit`` needs a current mesh, as everywhere in JAX. Over axes that are
        neither token nor expert axes the layer is replicated: what is sharded over them is gathered
        first, and each of their ranks computes the same. Axes that a surrounding shard_map has made
        manual stay so: x and the parameters are then this rank's shards. Where that shard_map
        leaves axes over (``axis_names=``), reverse mode computes the layer's forward pass again,
        and JAX cannot lower reverse mode over reverse mode. With ``check_vma=False`` neither holds.
      jitter_key: PRNG key for the router's jitter; None: no jitter.

    Returns:
      ``[..., H]`` and the report.

    Raises:
      ValueError: with the fix. The mesh lacks an axis; the experts do not divide among its ranks;
        x, a parameter or the mask has another shape than the configuration asks for; a parameter or
        the bias is missing, or has no use. When it is lowered: the program is for several devices,
        but there is no mesh.
      TypeError: x is not floating, or token_mask not bool.
    """
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        kind = ValueError if x.ndim < 2 else TypeError
        raise kind(f"MoE: x must be floating [..., H] of two or more dimensions, got {x.aval}.")
    _check_names(parameters, config.parameters(x.shape[-1]))
    expected = parameters["router"].shape[0]
    if x.shape[-1] != expected:
        raise ValueError(f"MoE: x has shape {x.shape}, but the layer's width is H={expected}.")
    experts_manual = experts_are_manual(config)
    mesh = current_mesh(config, mesh, (x, *parameters.values()))
    num_ranks = math.prod(mesh.shape[axis] for axis in config.expert_axes) if experts_manual else 1
    _check_shapes(parameters, config.parameters(expected, config.num_experts // num_ranks))
    if bias is not None:
        if config.router.bias_update_rate is None:
            raise ValueError(
                "MoE: there is a bias of the router, but config.router.bias_update_rate is None, "
                "so it would have no effect. Set the rate, to 0.0 for a bias that is only loaded, "
                "or leave the bias out."
            )
        parameters = {**parameters, "bias": bias}
    elif config.router.bias_update_rate is not None:
        raise ValueError(
            "MoE: bias is None, but config.router.bias_update_rate is set: give the router's bias, "
            f"float32 [{config.num_experts}], zeros at first."
        )
    if token_mask is not None:
        token_mask = _checked_mask(token_mask, x.shape[:-1])
    axes = frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)
    if not axes:
        return _shard(parameters, x, token_mask, jitter_key, config=config)
    # Compiled even if the caller has disabled jit: an exchange exists only in compiled programs.
    with jax.disable_jit(False):
        return _sharded(parameters, x, token_mask, jitter_key, config, mesh, axes, experts_manual)


def _check_names(parameters, needed):
    unused, missing = sorted(set(parameters) - set(needed)), sorted(set(needed) - set(parameters))
    if unused or missing:
        raise ValueError(
            f"MoE: of the parameters {sorted(parameters)} the configuration has no use for {unused}"
            f", and lacks {missing}. Change the parameters, or the settings: router.logits_bias, "
            "experts, shared_expert_width, shared_expert_gate."
        )


def _check_shapes(parameters, needed):
    for name, (shape, _) in needed.items():
        if parameters[name].shape != shape:
            raise ValueError(
                f"MoE: the parameter {name!r} has shape {parameters[name].shape}, but the "
                f"configuration asks for {shape}."
            )


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


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _sharded(parameters, x, token_mask, jitter_key, config, mesh, axes, experts_manual):
    """The layer in a shard_map over ``axes``, which are all axes that are not manual yet.

    Axes without tokens are among them, because XLA would have to partition the kernels over an axis
    that is left to it.
    """
    if mesh.size == 1:
        x = on_one_device(x)
    token_axes = tuple(axis for axis in config.all_token_axes if axis in axes)
    num_shards = math.prod(mesh.shape[axis] for axis in token_axes)
    expert_axes = () if experts_manual else config.expert_axes
    spread = config.spread_parameters(x.shape[-1])
    over = {name: expert_axes if name in spread else () for name in parameters}
    explicit = {
        axis
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    }

    def place(array, axes):
        """``array`` with its first dimension over ``axes``, where JAX does not do this itself."""
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
        # They vary over axes of a surrounding shard_map. JAX would shard what this nested shard_map
        # saves for the gradient over these axes once more, and cannot lower that. So it saves only
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
        logits_bias=parameters.get("router_bias"),
        bias=parameters.get("bias"),
        token_mask=token_mask,
        token_axes=token_axes,
        jitter_key=jitter_key,
    )
    experts = {n: parameters[n] for n in config.spread_parameters(tokens.shape[-1])}
    dtype = config.dtype or jnp.result_type(tokens, *experts.values())
    tokens = tokens.astype(dtype)
    experts = {name: a.astype(dtype) for name, a in experts.items()}
    y, num_dropped = _routed(experts, tokens, routing, config)
    if config.shared_expert_width is not None:
        shared = {n: parameters[f"shared_{n}"].astype(dtype) for n in experts}
        out = config.experts.shared(shared, tokens)
        if config.shared_expert_gate:
            gate = parameters["shared_expert_gate"].astype(dtype)
            out = jax.nn.sigmoid(jnp.dot(tokens, gate)) * out
        y = y + out
    if token_mask is not None:
        # The gradient of a masked token's output may be NaN. It must not reach the shared expert.
        y = _only(token_mask, y)
    report = Report(
        load=routing.load,
        dropped=lax.psum(num_dropped, token_axes),
        load_balance_loss=routing.load_balance_loss,
        z_loss=routing.z_loss,
        aux_loss=_auxiliary_loss(config.router, routing),
    )
    return y.reshape(x.shape), report


def _routed(experts, tokens, routing, config):
    """The weighted sums of the experts' outputs ``[T, H]``, and the number of drops."""
    sizes = {
        "num_ranks": lax.axis_size(config.expert_axes),
        "num_tokens": tokens.shape[0],
        "top_k": config.top_k,
        "num_experts": config.num_experts,
        "alignment": config.alignment,
    }
    capacity = None
    if config.capacity_factor is not None:
        capacity = balanced_capacity(config.capacity_factor, **sizes)
    rows, ids, weights = tokens, routing.topk_idx, routing.topk_weights
    weighted_input = config.router.weights_on == "input"
    if weighted_input:
        # Each expert of a token gets another row, so each assignment is sent as a token of its own.
        # The default capacity would not know that the experts of K neighbours are distinct.
        if capacity is None:
            capacity = dropless_capacity(**sizes)
        wide = jnp.promote_types(tokens.dtype, jnp.float32)
        rows = tokens.astype(wide)[:, None] * weights.astype(wide)[..., None]
        rows = rows.astype(tokens.dtype).reshape(tokens.shape[0] * config.top_k, tokens.shape[1])
        ids, weights = ids.reshape(-1, 1), None
    exchange = config.exchange or collective
    out = exchange.dispatch(
        rows,
        ids,
        num_experts=config.num_experts,
        axis_name=config.expert_axes,
        capacity=capacity,
        alignment=config.alignment,
        zero_tail=not config.experts.ignores_tail,
    )
    y = exchange.combine(config.experts(experts, out.tokens, out.group_sizes), out.handle, weights)
    if weighted_input:
        y = jnp.sum(y.reshape(tokens.shape[0], config.top_k, y.shape[1]), axis=1)
    return y, out.handle.num_dropped


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
