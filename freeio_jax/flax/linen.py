"""The MoE layer for ``flax.linen``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import module as flax_module
from jax.sharding import PartitionSpec

from freeio_jax.flax.config import MoEConfig
from freeio_jax.flax.custom_router import CustomRouter
from freeio_jax.flax.experts import DEFAULT_EXPERTS, Experts
from freeio_jax.flax.mesh import check_divides, check_manual, explicit_axes, manual_sizes
from freeio_jax.flax.moe import moe
from freeio_jax.flax.parameters import initializer
from freeio_jax.flax.partition import axes_of
from freeio_jax.flax.router import DEFAULT_ROUTER, Router, update_bias


class MoE(nn.Module):
    """A Mixture-of-Experts layer whose experts are spread over a mesh axis.

    ``__call__(x, deterministic=False, token_mask=None, router_input=None)`` takes ``[..., H]``,
    under ``jit`` with a mesh a global array, and returns ``[..., H]``. ``deterministic=True`` is
    for evaluation: no jitter, and the router's bias stays. ``token_mask``, bool of
    ``x.shape[:-1]``, is false for padding. Such tokens may be NaN. They are routed nowhere, take no
    room, are not counted, and have no part in the losses. Their output is zero, also that of the
    shared expert. ``router_input`` is what the router sees instead of x: ``[..., W]``, or for a
    custom router any pytree of arrays that begin as x does.

    It reports what all devices did together, with one entry for each call in an ``apply``. ``init``
    reports nothing. Reports of an earlier ``apply`` that are passed in again are replaced.
    The collections:

      * ``losses``: ``aux_loss``, to add to the training loss;
      * ``intermediates``: ``load`` (int32 ``[E + Z]``, assignments to each expert), ``dropped``
        (int32), and ``load_balance_loss`` and ``z_loss`` (without coefficients);
      * ``drops``: ``expert_drops`` (int32 ``[E]``) and ``source_drops`` (int32, one for each rank
        that holds tokens): what was dropped, by expert and by rank;
      * ``router_state``: ``bias`` (float32 ``[E + Z]``), where ``router.bias_update_rate``
        is set: updated by each call that is not deterministic, so it must be mutable there. With a
        rate of 0.0 it is never updated.

    Parameters: ``router`` ``[H, E]`` (float32), ``gate_up`` ``[E, H, 2*F]``, ``down``
    ``[E, F, H]``, ``shared_gate_up`` ``[H, 2*S]``, ``shared_down`` ``[S, H]``. Instead of
    ``gate_up`` and ``down`` other ``experts`` have other names. Where the settings ask for them
    there are ``router_bias`` ``[E]`` (float32) and ``shared_expert_gate`` ``[H, 1]``. The experts'
    parameters carry the partitioning ``(axis_name, None, ...)``. Inside a shard_map over the expert
    axis they are this rank's shards, ``[E/R, ...]``. The random stream of ``router.jitter`` is
    ``jitter``.

    Attributes:
      num_experts: E; a multiple of the expert axis's size, or see ``pad_experts_to``.
      top_k: K, experts of one token.
      expert_width: F, hidden width of one expert.
      router: how tokens choose their experts.
      capacity_factor: room of a rank as a multiple of its even share (MaxText's
        ``ragged_buffer_factor``, not its ``capacity_factor``, which is for one expert and
        sequence); None: nothing is dropped.
      alignment: the rows of each expert are padded to a multiple of it.
      shared_expert_width: S, hidden width of an expert that sees every token; None for none.
      axis_name: mesh axis, or axes, over which the experts are spread.
      token_axes: mesh axes over which the tokens are sharded; None: the expert axes alone.
      mesh: None: the current mesh (``jax.set_mesh``), or one device where there is none.
      dtype: of the experts' computation; None: the common dtype of input and parameters.
      exchange: what has the functions ``dispatch`` and ``combine``, ``freeio_jax.reference`` say;
        None: ``freeio_jax`` itself.
      param_dtype: of the experts' parameters.
      kernel_init: initializer of each matrix, applied to each expert on its own.
      experts: what the experts compute, as ``freeio_jax.flax.experts.SwiGLU()``.
      shared_expert_gate: whether the shared expert's output is multiplied with
        ``sigmoid(x @ shared_expert_gate)`` (Qwen2-MoE).
      num_zero_experts: Z, experts that return their input (LongCat-Flash): ids ``E`` to
        ``E + Z - 1``.
      pad_experts_to: P, first dimension of the experts' parameters, where the ranks do not divide
        E: 64, say, for 60 experts on 8 ranks. No token reaches the experts from E on.
      router_width: W, features of ``router_input``; None: H.
      drops: ``"evenly"``: each expert and source rank loses the same share, for a small all-gather
        and a sort (``freeio_jax.flax.drops``); or ``"last"`` in packed order, for nothing.
      fsdp_axes: mesh axes, of ``token_axes`` but not the expert axes, over which the experts'
        matrices are sharded as well, to be gathered where they are used.
      model_axes: mesh axes without tokens over which the experts' hidden width is split; with
        ``experts=SwiGLU(separate=True)``, say.
      overlap: whether the shared expert runs beside the combine, and in the backward pass the
        experts' weights' gradients beside the exchange that brings the tokens' gradient back
        (``docs/overlap.md``). :class:`~freeio_jax.flax.MoEConfig` says more.
      num_chunks: n, the number of chunks that the tokens of a rank are cut into. While the experts
        multiply one chunk, the next is dispatched, and the one before is combined. The room of
        ``capacity_factor`` is that of each chunk.
      expert_capacity: rows of one expert for one sequence, the L tokens of ``x[..., L, H]``. Those
        of later tokens are dropped. None: no such bound. (Switch Transformers, MaxText's
        ``capacity_factor``.) Whole sequences are padded then, so B should be a multiple of the
        ranks that hold tokens.

    >>> import jax, jax.numpy as jnp
    >>> from freeio_jax.flax.linen import MoE
    >>> layer = MoE(num_experts=4, top_k=2, expert_width=16)
    >>> x = jnp.ones((2, 3, 8))
    >>> params = layer.init(jax.random.key(0), x)["params"]
    >>> y, state = layer.apply({"params": params}, x, mutable=["intermediates", "losses"])
    >>> y.shape, int(state["intermediates"]["load"][0].sum())
    ((2, 3, 8), 12)
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
    mesh: Any = None
    dtype: Any = None
    exchange: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()
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

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], layer: int | str | None = None, **options: Any
    ) -> MoE:
        """The layer that computes what the MoE block of a Hugging Face model computes.

        Its losses and jitter are off. ``freeio_jax.hf.load_moe`` loads its weights.

        Args:
          config: the contents of config.json.
          layer: the number of the decoder layer, needed where layers differ.
          options: more attributes of the layer, or others than the model's.

        Raises:
          ValueError: the family is not known, or the layer cannot express it; the message says what
            of it.

        >>> from freeio_jax.flax.linen import MoE
        >>> config = {"model_type": "mixtral", "hidden_size": 8, "intermediate_size": 16}
        >>> layer = MoE.from_hf(config, alignment=4)
        >>> layer.num_experts, layer.expert_width, layer.alignment
        (8, 16, 4)
        """
        # Not at the top: the table of families is made of this package's experts and routers.
        from freeio_jax.hf.options import moe_options

        settings = moe_options(config, layer) | options
        del settings["width"]
        return cls(**settings)

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        deterministic: bool = False,
        token_mask: jax.Array | None = None,
        router_input: Any = None,
    ) -> jax.Array:
        config = MoEConfig(
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(MoEConfig)}
        )
        width = x.shape[-1]
        check_manual(config)
        check_divides(config, self.mesh, width)
        # Arrays of a checkpoint, say, for which the layer has no use are given to moe(), which says
        # so. Flax would ignore them.
        parameters = dict(self.variables.get("params", {}))
        of_router = config.router_parameters(width)
        for name, (shape, names) in config.parameters(width, manual_sizes()).items():
            init = _sharded(initializer(config, width, name, self.kernel_init), names)
            dtype = jnp.float32 if name in of_router else self.param_dtype
            box = self.param(name, nn.with_partitioning(init, names), shape, dtype, unbox=False)
            parameters[name] = _value(box)

        bias, training = None, not deterministic and not self.is_initializing()
        if self.router.bias_update_rate is not None:
            variable = self.variable(
                "router_state", "bias", jnp.zeros, (config.num_choices,), jnp.float32
            )
            bias = variable.value
        elif self.has_variable("router_state", "bias"):
            bias = self.get_variable("router_state", "bias")
        jitters = training and self.router.needs_key
        jitter_key = self.make_rng("jitter") if jitters else None
        y, report = moe(
            parameters,
            x,
            config,
            router_input=router_input,
            bias=bias,
            token_mask=token_mask,
            mesh=self.mesh,
            jitter_key=jitter_key,
        )
        if training and self.router.bias_update_rate:
            variable.value = update_bias(bias, report.load, self.router.bias_update_rate)
        if not self.is_initializing():
            self._sow(report)
        return y

    def _sow(self, report):
        """Appends to the reports of this ``apply``; replaces reports that were passed to it."""
        for field in dataclasses.fields(report):
            collection = _COLLECTIONS.get(field.name, "intermediates")
            again = _has_reported(self, collection, field.name)
            self.sow(
                collection,
                field.name,
                getattr(report, field.name),
                reduce_fn=lambda old, new, again=again: (*old, new) if again else (new,),
            )


#: Where reports go; those that are not here go to ``intermediates``.
_COLLECTIONS = {"aux_loss": "losses", "expert_drops": "drops", "source_drops": "drops"}

_NOTHING = {}


def _has_reported(layer: nn.Module, collection: str, name: str) -> bool:
    """Whether ``layer`` has reported ``name`` in this ``apply``, and the report is still there.

    A lifted transformation (``nn.remat``, ``nn.scan``) gives the layer a copy of the variables. In
    the copy a report of this ``apply`` looks like one that was passed in. So this looks into the
    variables that were copied: there a new report is another object than what was first found. JAX
    may trace a body twice. The report of the first trace does not get into those variables, so the
    second trace does not count it.
    """
    answer = False
    for owner in _owners(layer):
        path, above = layer.scope.path, owner.scope.path
        if path[: len(above)] != above:
            continue
        value = owner.scope.variables()
        for key in (collection, *path[len(above) :], name):
            value = value.get(key, _NOTHING)
        at_first = owner.__dict__.setdefault("_moe_reports_at_first", {})
        answer |= at_first.setdefault((collection, path, name), value) is not value
    return answer


def _owners(layer: nn.Module) -> Iterator[nn.Module]:
    """The modules whose scopes hold variables of ``layer``.

    They are the module that ``apply`` has bound, and a clone for each lifted transformation around
    the layer. They live as long as the variables do. Scopes do not: each call makes new ones.
    """
    for module in (*flax_module._context.module_stack, layer):
        while module is not None and isinstance(module.parent, nn.Module):
            module = module.parent
        if module is not None and module.scope is not None:
            yield module


def _sharded(init: Callable[..., jax.Array], names: tuple) -> Callable[..., jax.Array]:
    """``init``, whose arrays lie over the explicit axes of the current mesh as ``names`` say."""
    explicit = explicit_axes(jax.sharding.get_abstract_mesh())

    def over(entry):
        return tuple(axis for axis in axes_of(entry) if axis in explicit)

    spec = PartitionSpec(*map(over, names))
    return lambda *args: jax.reshard(init(*args), spec) if any(spec) else init(*args)


def _value(box):
    if not isinstance(box, nn.meta.AxisMetadata):
        return box
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes or explicit_axes(mesh):
        # Flax would constrain the sharding. Shards have none, and over explicit axes an array keeps
        # the one that it has; moe() changes it where the layer needs another one.
        return box.value
    return nn.meta.unbox(box)
