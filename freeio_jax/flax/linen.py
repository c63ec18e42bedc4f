"""The MoE layer for ``flax.linen``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import module as flax_module

from freeio_jax.flax.config import ROUTER_ARRAYS, MoEConfig
from freeio_jax.flax.experts import DEFAULT_EXPERTS, Experts
from freeio_jax.flax.mesh import check_divides, experts_are_manual
from freeio_jax.flax.moe import initializer, moe
from freeio_jax.flax.router import DEFAULT_ROUTER, Router, update_bias


class MoE(nn.Module):
    """A Mixture-of-Experts layer whose experts are spread over a mesh axis.

    ``__call__(x, deterministic=False, token_mask=None)`` takes ``[..., H]``, under ``jit`` with a
    mesh a global array, and returns ``[..., H]``. ``deterministic=True`` is for evaluation: no
    jitter, and the router's bias stays. ``token_mask``, bool of ``x.shape[:-1]``, is false for
    padding. Such tokens may be NaN. They are routed nowhere, take no room, are not counted, and
    have no part in the losses. Their output is zero, also that of the shared expert.

    It reports what all devices did together, with one entry for each call in an ``apply``. ``init``
    reports nothing. Reports of an earlier ``apply`` that are passed in again are replaced.
    The collections:

      * ``losses``: ``aux_loss``, to add to the training loss;
      * ``intermediates``: ``load`` (int32 ``[E]``, assignments to each expert),
        ``dropped`` (int32), ``load_balance_loss`` and ``z_loss`` (without coefficients);
      * ``router_state``: ``bias`` (float32 ``[E]``), where ``router.bias_update_rate``
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
      num_experts: E; a multiple of the expert axis's size.
      top_k: K, experts of one token.
      expert_width: F, hidden width of one expert.
      router: how tokens choose their experts.
      capacity_factor: room of a rank as a multiple of its even share; None: nothing is dropped.
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
    router: Router = DEFAULT_ROUTER
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
    ) -> jax.Array:
        config = MoEConfig(
            num_experts=self.num_experts,
            top_k=self.top_k,
            expert_width=self.expert_width,
            router=self.router,
            capacity_factor=self.capacity_factor,
            alignment=self.alignment,
            shared_expert_width=self.shared_expert_width,
            axis_name=self.axis_name,
            token_axes=self.token_axes,
            dtype=self.dtype,
            exchange=self.exchange,
            experts=self.experts,
            shared_expert_gate=self.shared_expert_gate,
        )
        check_divides(config, self.mesh)
        manual = experts_are_manual(config)
        num_ranks = jax.lax.axis_size(config.expert_axes) if manual else 1
        # Arrays of a checkpoint, say, for which the layer has no use are given to moe(), which says
        # so. Flax would ignore them.
        parameters = dict(self.variables.get("params", {}))
        for name, (shape, names) in config.parameters(
            x.shape[-1], self.num_experts // num_ranks
        ).items():
            init = initializer(self.kernel_init, names)
            dtype = jnp.float32 if name in ROUTER_ARRAYS else self.param_dtype
            box = self.param(name, nn.with_partitioning(init, names), shape, dtype, unbox=False)
            # Unboxing also constrains the sharding, which is for global arrays, not for shards.
            parameters[name] = nn.meta.unbox(box) if not manual else _value(box)

        bias, training = None, not deterministic and not self.is_initializing()
        if self.router.bias_update_rate is not None:
            variable = self.variable(
                "router_state", "bias", jnp.zeros, (self.num_experts,), jnp.float32
            )
            bias = variable.value
        elif self.has_variable("router_state", "bias"):
            bias = self.get_variable("router_state", "bias")
        jitters = training and self.router.jitter
        jitter_key = self.make_rng("jitter") if jitters else None
        y, report = moe(
            parameters,
            x,
            config,
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
            collection = "losses" if field.name == "aux_loss" else "intermediates"
            again = _has_reported(self, collection, field.name)
            self.sow(
                collection,
                field.name,
                getattr(report, field.name),
                reduce_fn=lambda old, new, again=again: (*old, new) if again else (new,),
            )


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


def _value(box):
    return box.value if isinstance(box, nn.meta.AxisMetadata) else box
