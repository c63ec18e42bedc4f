"""A byte-level Mixture-of-Experts Transformer, and its training step on a data x expert mesh."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from freeio_jax.flax.nnx import AuxLoss, Dropped, ExpertLoad, MoE

MESH_AXES = ("data", "expert")
VOCABULARY = 256  # bytes


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What decides the shapes of the parameters: a checkpoint fits one of these only."""

    layers: int
    width: int
    heads: int
    context: int
    experts: int
    top_k: int
    expert_width: int


def rotate(x):
    """Rotary position embedding (arXiv:2104.09864) of ``[B, L, heads, D]``."""
    length, half = x.shape[1], x.shape[-1] // 2
    frequency = 1e4 ** -(jnp.arange(half) / half)
    angle = (jnp.arange(length)[:, None] * frequency)[:, None]
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Block(nnx.Module):
    """Causal attention, then a Mixture of Experts, each on normalized input and added to it."""

    def __init__(self, config: ModelConfig, moe_options, dtype, rngs):
        self.heads = config.heads
        self.attention_norm = nnx.RMSNorm(config.width, dtype=dtype, rngs=rngs)
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
        self.qkv = linear(config.width, 3 * config.width)
        self.out = linear(config.width, config.width)
        self.moe_norm = nnx.RMSNorm(config.width, dtype=dtype, rngs=rngs)
        self.moe = MoE(
            config.width,
            num_experts=config.experts,
            top_k=config.top_k,
            expert_width=config.expert_width,
            token_axes=MESH_AXES,
            dtype=dtype,
            rngs=rngs,
            **moe_options,
        )

    def __call__(self, x):
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).reshape(batch, length, 3, self.heads, -1)
        q, k, v = jnp.unstack(qkv, axis=2)
        attended = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.out(attended.reshape(batch, length, width))
        return x + self.moe(self.moe_norm(x))


class ByteTransformer(nnx.Module):
    """Decoder-only: bytes ``[B, L]`` to the logits of each next byte, float32 ``[B, L, 256]``."""

    def __init__(self, config: ModelConfig, moe_options, dtype, rngs):
        embed = functools.partial(nnx.Embed, features=config.width, dtype=dtype, rngs=rngs)
        small = nnx.initializers.normal(0.02)
        self.embed = embed(VOCABULARY, embedding_init=small)
        self.blocks = nnx.List(
            [Block(config, moe_options, dtype, rngs) for _ in range(config.layers)]
        )
        self.norm = nnx.RMSNorm(config.width, dtype=dtype, rngs=rngs)

    def __call__(self, tokens):
        # A lookup by product: its gradient by scatter, where the same bytes come again and again,
        # took 25 ms of a step of 41 on GPUs.
        one_hot = jax.nn.one_hot(tokens, VOCABULARY, dtype=self.embed.dtype)
        x = one_hot @ self.embed.embedding[...].astype(self.embed.dtype)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x)).astype(jnp.float32)


def cross_entropy(model, window):
    """Mean over a batch ``[B, L + 1]`` of the nats that each next byte costs."""
    logits = model(window[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:]).mean()


def reported(model, kind):
    """What the MoE layers report in Variables of type ``kind``, one entry for each layer."""
    return jnp.stack(jax.tree.leaves(nnx.state(model, kind)))


class Trainer:
    """The model's state on the mesh, and the compiled functions of it.

    ``state`` is a pytree of global arrays: parameters, optimizer state and the step. The experts'
    parameters and their optimizer state are spread over the expert axis, all else is replicated.
    ``moe_options``: what the MoE layers get beside the shapes: ``capacity_factor``, ``exchange``.
    """

    def __init__(self, config, mesh, *, moe_options, optimizer, seed):
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        self.mesh, self.optimizer = mesh, optimizer

        def create():
            return ByteTransformer(config, moe_options, dtype, nnx.Rngs(seed))

        def init():
            _, params, _ = nnx.split(create(), nnx.Param, nnx.Intermediate)
            return {"params": params, "opt": optimizer.init(params), "step": jnp.zeros((), int)}

        # The modules' structure, and each array's sharding from its Variable's metadata.
        self.graph, _, self.blank = nnx.split(nnx.eval_shape(create), nnx.Param, nnx.Intermediate)
        shardings = nnx.get_named_sharding(jax.eval_shape(init), mesh)
        self.state = jax.jit(init, out_shardings=shardings)()
        self.train_step = jax.jit(
            self._train_step, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, P()))
        )
        self.evaluate = jax.jit(lambda params, window: cross_entropy(self.model(params), window))
        self.next_byte = jax.jit(self._next_byte)

    def model(self, params):
        blank = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self.blank)
        return nnx.merge(self.graph, params, blank)

    def _train_step(self, state, window):
        def loss(params):
            model = self.model(params)
            nats = cross_entropy(model, window)
            report = {"nats": nats, "load": reported(model, ExpertLoad)}
            report["dropped"] = reported(model, Dropped).sum()
            return nats + reported(model, AuxLoss).sum(), report

        grads, report = jax.grad(loss, has_aux=True)(state["params"])
        updates, opt = self.optimizer.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt": opt, "step": state["step"] + 1}, report

    def _next_byte(self, params, window, key):
        """Draws a byte after ``window`` ``[1, L]`` and moves the window on to it."""
        logits = self.model(params)(window)[:, -1]
        drawn = jax.random.categorical(key, logits / 0.8).astype(window.dtype)
        return jnp.concatenate([window[:, 1:], drawn[:, None]], axis=1)

    def sample(self, prompt, length, seed):
        """``length`` bytes that go on from ``prompt`` (bytes, as many as the context)."""
        window = jnp.asarray(np.frombuffer(prompt, np.uint8)[None], jnp.int32)
        drawn = []
        for key in jax.random.split(jax.random.key(seed), length):
            window = self.next_byte(self.state["params"], window, key)
            drawn.append(int(window[0, -1]))
        return bytes(drawn)
