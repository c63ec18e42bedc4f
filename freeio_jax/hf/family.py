"""The words of the table of model families: what an entry can say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from freeio_jax.flax.experts import Experts, squared_relu
from freeio_jax.flax.router import Router

#: Stands for the default of a setting that config.json must have.
REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Key:
    """A setting that config.json holds.

    Attributes:
      names: the first of these keys that config.json has; ``"a.b"`` is the key b of the object a.
      default: where it has none of them, the default of transformers. Without one that is an error.
      values: what each value of config.json means for the layer. None: the value itself. A value
        that is not among them cannot be expressed.
      only_if: another key and a value. Where that key has another value, the default holds.
    """

    names: tuple[str, ...]
    default: Any = REQUIRED
    values: Mapping[Any, Any] | None = None
    only_if: tuple[Key, Any] | None = None

    @property
    def is_required(self) -> bool:
        """Whether config.json must have it."""
        return self.default is REQUIRED


@dataclasses.dataclass(frozen=True)
class Times:
    """The product of several settings."""

    factors: tuple[Key, ...]


@dataclasses.dataclass(frozen=True)
class Only:
    """A setting for which the layer has one value, or a few.

    Attributes:
      key: the setting.
      allowed: its values that the layer can express.
      reason: what it means if it has another value.
      unless_zero: another setting. Where it is zero, any value will do.
    """

    key: Key
    allowed: tuple
    reason: str
    unless_zero: Key | None = None


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter of the layer in the files.

    Attributes:
      names: of the tensors whose columns, one after the other, are the parameter's columns; from
        the decoder layer on. With ``{expert}`` each expert has a tensor of its own. Without it the
        tensor of a parameter of all experts has a first dimension for them.
      half: which half of the tensors' columns is meant; None: all.
      transposed: whether the files have ``[out, in]``, as torch's Linear. The layer's are
        ``[in, out]``.
      flat: whether the dimension of the experts and the next one are a single one (DBRX).
    """

    names: tuple[str, ...]
    transposed: bool = True
    flat: bool = False
    half: int | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family of models needs.

    Attributes:
      title: its name for people.
      model_types: values of ``model_type`` in config.json.
      num_experts, top_k, expert_width, shared_expert_width: the layer's settings.
      shared_expert_gate: the layer's setting.
      width: H.
      num_zero_experts: the layer's setting.
      expert_capacity: the layer's setting.
      router_kind: ``freeio_jax.flax.Router``, or a class of ``freeio_jax.flax.routers``.
      router: its settings; those that are not here are the defaults.
      router_input: whether the router sees another input than the experts, so that the layer is
        called with ``router_input=``.
      experts: gives the experts from a function that looks settings up.
      activation: the name of the activation between the products.
      weights: where each parameter is in the files. Alternatives are tried in order.
      layer: where a decoder layer's tensors are, after one of :data:`BASES`.
      blocks: the modules in the model of transformers, after ``layer``, whose outputs' sum is the
        layer's output. The first one has the experts; others may be missing.
      only: settings that the layer can express with some values alone.
      other_models: how the names of tensors begin that belong to another model in the same files.
    """

    title: str
    model_types: tuple[str, ...]
    num_experts: Key
    top_k: Key
    expert_width: Key
    weights: Mapping[str, tuple[Weight, ...]]
    shared_expert_width: Key | Times | None = None
    shared_expert_gate: bool = False
    width: Key = Key(("hidden_size",))
    num_zero_experts: Key | None = None
    expert_capacity: Key | None = None
    router_kind: type = Router
    router: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    router_input: bool = False
    experts: Callable[[Callable[[Any], Any], Callable], Experts] | None = None
    activation: Key = Key(("hidden_act",), "silu")
    layer: str = "layers.{layer}."
    blocks: tuple[str, ...] = ("mlp",)
    only: tuple[Only, ...] = ()
    other_models: tuple[str, ...] = ()

    @property
    def router_tensor(self) -> str:
        """The tensor of the router's matrix: where it is, a decoder layer has an MoE block."""
        (weight,) = self.weights.get("router") or self.weights["router_kernel"]
        return weight.names[0]


#: What may come before ``Family.layer`` in the names of tensors: whole models, their text parts,
#: and a model without its head.
BASES = (
    "model.",
    "",
    "model.language_model.",
    "language_model.model.",
    "language_model.",
    "thinker.model.",
    "transformer.",
    "backbone.",
)


def exact_gelu(x: jax.Array) -> jax.Array:
    """GELU by the error function: Hugging Face's ``"gelu"``."""
    return jax.nn.gelu(x, approximate=False)


#: Functions of ``hidden_act``. ``jax.nn.gelu`` is the approximation by tanh.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu2": squared_relu,
    "gelu": exact_gelu,
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
}
