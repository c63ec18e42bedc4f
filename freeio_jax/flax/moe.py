"""The functional core of the MoE layers: route, dispatch, experts, combine, on any mesh."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from freeio_jax.flax.config import MoEConfig
from freeio_jax.flax.custom_router import route_by
from freeio_jax.flax.mesh import check_manual, current_mesh, explicit_axes, manual_sizes
from freeio_jax.flax.one_device import on_one_device
from freeio_jax.flax.parameters import check_names, check_shapes
from freeio_jax.flax.partition import axes_of, gather, of_first_slice
from freeio_jax.flax.report import Report
from freeio_jax.flax.routed import routed
from freeio_jax.flax.router import Router, route
from freeio_jax.varying import checks_varying_axes, vary, varying_axes


def moe(
    parameters: dict[str, jax.Array],
    x: jax.Array,
    config: MoEConfig,
    *,
    router_input: Any = None,
    bias: jax.Array | None = None,
    token_mask: jax.Array | None = None,
    mesh: jax.sharding.Mesh | AbstractMesh | None = None,
    jitter_key: jax.Array | None = None,
) -> tuple[jax.Array, Report]:
    """Evaluates an MoE layer.

    Args:
      parameters: arrays by the names and shapes of ``config.parameters(H)``.
      x: ``[..., H]``, floating, at least two dimensions. The first is sharded over the token axes.
        Where it does not divide evenly, all tokens together are padded until they do. With
        ``expert_capacity`` x is ``[..., L, H]``, and whole sequences are padded instead: B should
        be a multiple of the ranks that hold tokens, where x is ``[B, L, H]``.
      config: the layer.
      router_input: what the router sees; None: x. ``[..., W]``, floating, with the dimensions of x
        before the last one; W is ``config.router_width``. A custom router may take a pytree of
        arrays that begin with these dimensions, of any dtypes (token ids, say). The experts, the
        shared one too, see x.
      bias: float32 ``[E]`` of the router (``[E + Z]`` with Z zero experts), where
        ``config.router.bias_update_rate`` is set and only there.
      token_mask: bool of ``x.shape[:-1]``; None: all true. A token where it is false is padding. It
        is routed nowhere, takes no room, is not counted and has no part in the losses. It may be
        NaN. Its output and its gradient are zero.
      mesh: None: the current mesh (``jax.set_mesh``); without one, the mesh of the arguments'
        shardings; without that, the layer runs on one device. Where the mesh has explicit axes,
        ``jax.grad`` outside ``jit`` needs a current mesh, as everywhere in JAX. Over axes that are
        neither token, expert nor model axes the layer is replicated: what is sharded over them is
        gathered first, and each of their ranks computes the same. Axes that a surrounding shard_map
        has made manual stay so: x and the parameters are then this rank's shards. Where that
        shard_map leaves axes over (``axis_names=``), reverse mode computes the layer's forward pass
        again, and JAX cannot lower reverse mode over reverse mode. With ``check_vma=False`` neither
        holds.
      jitter_key: PRNG key for the router's jitter; None: no jitter.

    Returns:
      ``[..., H]`` and the report.

    Raises:
      ValueError: with the fix. The mesh lacks an axis; the experts do not divide among its ranks;
        x, a parameter, the router's input or the mask has another shape than the configuration asks
        for; a parameter or the bias is missing, or has no use. When it is lowered: the program is
        for several devices, but there is no mesh.
      TypeError: x is not floating, or token_mask not bool.
    """
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        kind = ValueError if x.ndim < 2 else TypeError
        raise kind(f"MoE: x must be floating [..., H] of two or more dimensions, got {x.aval}.")
    if config.expert_capacity is not None and x.ndim < 3:
        raise ValueError(
            f"MoE: expert_capacity={config.expert_capacity} is for each sequence, so x must be "
            f"[..., L, H] of three or more dimensions, got {x.aval}. Reshape it to [B, L, H], "
            "which is x[None] for one sequence alone, or set expert_capacity=None to drop nothing."
        )
    width = x.shape[-1]
    check_names(parameters, config, width)
    if isinstance(config.router, Router) and config.router_width is None:
        expected = parameters["router"].shape[0]
        if width != expected:
            raise ValueError(f"MoE: x has shape {x.shape}, but the layer's width is H={expected}.")
    router_input = _checked_router_input(router_input, x, config)
    arrays = (x, *jax.tree.leaves(router_input), *parameters.values())
    check_manual(config)
    mesh = current_mesh(config, mesh, arrays, width)
    check_shapes(parameters, config, width, manual_sizes())
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
            f"float32 [{config.num_choices}], zeros at first."
        )
    if token_mask is not None:
        token_mask = _checked_mask(token_mask, x.shape[:-1])
    arguments = (parameters, x, router_input, token_mask, jitter_key)
    axes = frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)
    if not axes:
        return _shard(*arguments, config=config)
    # Compiled even if the caller has disabled jit: an exchange exists only in compiled programs.
    with jax.disable_jit(False):
        return _sharded(*arguments, config, mesh, axes)


def _checked_router_input(router_input, x, config):
    given = router_input is not None
    router_input = jax.tree.map(jnp.asarray, router_input) if given else x
    leaves = jax.tree.leaves(router_input)
    for leaf in leaves:
        if leaf.shape[: x.ndim - 1] != x.shape[:-1]:
            raise ValueError(
                f"MoE: router_input has an array of shape {leaf.shape}, but x has shape {x.shape}: "
                f"there must be one row for each token, that is, {x.shape[:-1]} at first."
            )
    if not isinstance(config.router, Router):
        return router_input if given else None
    width = x.shape[-1] if config.router_width is None else config.router_width
    array = router_input if isinstance(router_input, jax.Array) else leaves
    if array is leaves or array.ndim != x.ndim or not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            "MoE: router_input must be one floating array with as many dimensions as x, got "
            f"{jax.tree.map(jnp.shape, router_input)}. Other inputs need a router of your own: "
            "freeio_jax.flax.CustomRouter."
        )
    if array.shape[-1] != width:
        what = "router_input" if given else "x, which the router sees as well,"
        raise ValueError(
            f"MoE: {what} has {array.shape[-1]} features, but the router's width is {width}. Set "
            "router_width to the features of router_input; None means those of x."
        )
    return router_input if given else None


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


@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def _sharded(parameters, x, router_input, token_mask, jitter_key, config, mesh, axes):
    """The layer in a shard_map over ``axes``, which are all axes that are not manual yet.

    Axes without tokens are among them, because XLA would have to partition the kernels over an axis
    that is left to it.
    """
    if mesh.size == 1:
        x = on_one_device(x)
    token_axes = tuple(axis for axis in config.all_token_axes if axis in axes)
    num_shards = math.prod(mesh.shape[axis] for axis in token_axes)
    names = {name: names for name, (_, names) in config.parameters(x.shape[-1]).items()}
    over = {
        name: tuple(tuple(a for a in axes_of(e) if a in axes) for e in names.get(name, ()))
        for name in parameters
    }
    explicit = explicit_axes(mesh)

    def place(array, *over):
        """``array`` with its first dimensions over axes, where JAX does not do this itself."""
        if not explicit:
            return array
        spec = (tuple(axis for axis in axes if axis in explicit) for axes in over)
        return jax.reshard(array, NamedSharding(mesh, PartitionSpec(*spec)))

    shape = x.shape
    padded = shape[0] % num_shards > 0
    if padded:
        mask = jnp.ones(shape[:-1], bool) if token_mask is None else token_mask
        # Sequences stay whole where an expert has room for so many tokens of each.
        unit = shape[:-1] if config.expert_capacity is None else shape[:1]
        more = -math.prod(unit) % num_shards

        def pad(array):
            units = place(array, ()).reshape(math.prod(unit), *array.shape[len(unit) :])
            return jnp.pad(units, [(0, more)] + [(0, 0)] * (units.ndim - 1))

        x, router_input, token_mask = jax.tree.map(pad, (x, router_input, mask))
    tokens_spec = PartitionSpec(token_axes)
    shard = functools.partial(_shard, config=config)
    if varying_axes(x, *jax.tree.leaves(router_input), *parameters.values()):
        # They vary over axes of a surrounding shard_map. JAX would shard what this nested shard_map
        # saves for the gradient over these axes once more, and cannot lower that. So it saves only
        # its arguments, and computes the rest again.
        shard = jax.checkpoint(shard)
    y, report = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(
            {name: PartitionSpec(*entries) for name, entries in over.items()},
            tokens_spec,
            tokens_spec,
            tokens_spec,
            PartitionSpec(),
        ),
        out_specs=(tokens_spec, PartitionSpec()),
        axis_names=axes,
        # Inside a shard_map without the check, no type says what varies over its axes.
        check_vma=checks_varying_axes() or not mesh.manual_axes,
    )(
        {name: place(a, *over[name]) for name, a in parameters.items()},
        *jax.tree.map(lambda a: place(a, token_axes), (x, router_input, token_mask)),
        jitter_key,
    )
    if padded:
        y = place(y, ())[: math.prod(unit)].reshape(shape)
    return y, report


def _shard(parameters, x, router_input, token_mask, jitter_key, config):
    """One rank's part."""
    token_axes, width = config.all_token_axes, x.shape[-1]
    tokens = x.reshape(-1, width)
    if token_mask is not None:
        token_mask = token_mask.reshape(-1)
        tokens = _only(token_mask, tokens)
    if router_input is None:
        router_input = tokens
    else:
        router_input = jax.tree.map(
            lambda a: a.reshape(tokens.shape[0], *a.shape[x.ndim - 1 :]), router_input
        )
    # Before any cast, so that gradients are summed over the ranks in the parameters' dtype.
    names = {name: names for name, (_, names) in config.parameters(width).items()}
    parameters = gather(parameters, names, config.fsdp_axes)
    parameters = {name: vary(a, token_axes) for name, a in parameters.items()}
    routing = _route(parameters, router_input, tokens, token_mask, jitter_key, config)
    experts = {n: parameters[n] for n in config.spread_parameters(width)}
    dtype = config.dtype or jnp.result_type(tokens, *experts.values())
    tokens = tokens.astype(dtype)
    experts = {name: a.astype(dtype) for name, a in experts.items()}
    # Each rank of the model axes has a slice of F. A token's gradient is summed over them here, not
    # for each of its rows.
    model_axes, shared_input = config.model_axes, vary(tokens, config.model_axes)
    experts = of_first_slice(config.experts, experts, model_axes)
    beside = None
    if config.shared_expert_width is not None:
        shared = {n: parameters[f"shared_{n}"].astype(dtype) for n in experts}
        shared = of_first_slice(config.experts, shared, model_axes)
        gate = None
        if config.shared_expert_gate:
            gate = parameters["shared_expert_gate"].astype(dtype)
        beside = functools.partial(_shared, config.experts), (shared, gate, shared_input)
    y, of_shared, drops = routed(experts, shared_input, routing, x.shape[-2], config, beside)
    if beside is not None:
        y = y + of_shared
    if model_axes:
        y = lax.psum(y, model_axes)
    if config.num_zero_experts:
        y = y + _zero_experts(tokens, routing, config)
    if token_mask is not None:
        # The gradient of a masked token's output may be NaN. It must not reach the shared expert.
        y = _only(token_mask, y)
    dropped, expert_drops, source_drops = drops
    report = Report(
        load=routing.load,
        dropped=dropped,
        expert_drops=expert_drops,
        source_drops=source_drops,
        load_balance_loss=routing.load_balance_loss,
        z_loss=routing.z_loss,
        aux_loss=_auxiliary_loss(config.router, routing),
    )
    return y.reshape(x.shape), report


def _route(parameters, router_input, tokens, token_mask, jitter_key, config):
    token_axes = config.all_token_axes
    if jitter_key is not None:
        jitter_key = jax.random.fold_in(jitter_key, lax.axis_index(token_axes))
    common = {"top_k": config.top_k, "token_mask": token_mask, "token_axes": token_axes}
    if isinstance(config.router, Router):
        return route(
            router_input,
            parameters["router"],
            router=config.router,
            logits_bias=parameters.get("router_bias"),
            bias=parameters.get("bias"),
            jitter_key=jitter_key,
            **common,
        )
    names = (*config.router_parameters(tokens.shape[-1]), "bias")
    return route_by(
        config.router,
        {n.removeprefix("router_"): parameters[n] for n in names if n in parameters},
        router_input,
        num_tokens=tokens.shape[0],
        num_experts=config.num_choices,
        key=jitter_key if config.router.needs_key else None,
        **common,
    )


def _shared(experts, parameters, gate, x):
    """``[T, H]``: what the expert computes that sees every token."""
    with jax.named_scope("shared_expert"):
        out = experts.shared(parameters, x)
        return out if gate is None else jax.nn.sigmoid(jnp.dot(x, gate)) * out


def _zero_experts(tokens, routing, config):
    """``[T, H]``: what the experts add that return their input. It needs no exchange."""
    ids, wide = routing.topk_idx, jnp.promote_types(tokens.dtype, jnp.float32)
    is_zero = (ids >= config.num_experts) & (ids < config.num_choices)
    weight = jnp.sum(jnp.where(is_zero, routing.topk_weights, 0), axis=1, keepdims=True)
    return (weight.astype(wide) * tokens.astype(wide)).astype(tokens.dtype)


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
