"""Generation: one program for the prompts, and one that is called for each further token."""

from __future__ import annotations

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models.cache import Cache
from models.decoder import Decoder, last_of
from models.sampling import choose


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Texts:
    """A batch of B texts as they grow.

    Attributes:
      cache: of all tokens but the last ones.
      last: int32 ``[B]``: the last token of each text.
      running: bool ``[B]``: false where the text has ended. Nothing more is computed for it: its
        tokens are dispatched to no expert.
      key: PRNG key of the next draws.
    """

    cache: Cache
    last: jax.Array
    running: jax.Array
    key: jax.Array


class Generator:
    """The two programs of a model, compiled for one size of batch.

    Args:
      model: with weights; ``weights.load`` makes one.
      mesh: on which it is. Where its size divides B, each device has B/R of the texts.
      batch: B.
      length: L of the prompts, padding included.
      new_tokens: the most that are generated.
      temperature, top_p: of ``sampling.choose``.

    Attributes:
      seconds_to_compile: what both programs took.
    """

    def __init__(
        self,
        model: Decoder,
        mesh: jax.sharding.Mesh,
        *,
        batch: int,
        length: int,
        new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ):
        self._choose = functools.partial(choose, temperature=temperature, top_p=top_p)
        self._slots = length + new_tokens
        self._graph, self._state = nnx.split(model)
        rows = P("expert") if batch % mesh.size == 0 else P()
        self._rows, self._whole = NamedSharding(mesh, rows), NamedSharding(mesh, P())

        def shape(dtype, *dimensions):
            sharding = self._rows if dimensions else self._whole
            return jax.ShapeDtypeStruct(dimensions, dtype, sharding=sharding)

        tokens, mask = shape(jnp.int32, batch, length), shape(jnp.bool_, batch, length)
        key = jax.eval_shape(lambda: jax.random.key(0))
        began = time.perf_counter()
        # Every array with a row for each text is sharded in the same way.
        shapes = jax.eval_shape(self._prefill, self._state, tokens, mask, key)
        shardings = jax.tree.map(
            lambda a: self._rows if a.shape[:1] == (batch,) else self._whole, shapes
        )
        prefill = jax.jit(self._prefill, out_shardings=shardings)
        self._compiled_prefill = prefill.lower(self._state, tokens, mask, key).compile()
        texts = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings
        )
        step = jax.jit(self._step, out_shardings=shardings, donate_argnums=1)
        self._compiled_step = step.lower(self._state, texts).compile()
        self.seconds_to_compile = time.perf_counter() - began

    def start(self, tokens, mask, seed: int) -> Texts:
        """Evaluates the prompts, ``[B, L]`` each, and chooses the first token of each text."""
        tokens, mask = jax.device_put((tokens, mask), self._rows)
        return self._compiled_prefill(self._state, tokens, mask, jax.random.key(seed))

    def step(self, texts: Texts) -> Texts:
        """Chooses the next token of each text: ``new_tokens - 1`` times at most after a start.

        ``texts`` must not be used again.
        """
        return self._compiled_step(self._state, texts)

    def _prefill(self, state, tokens, mask, key):
        model = nnx.merge(self._graph, state)
        cache = model.empty_cache(tokens.shape[0], self._slots)
        hidden, cache = model(tokens, mask, cache)
        return self._next(model, last_of(hidden, mask), cache, jnp.any(mask, axis=1), key)

    def _step(self, state, texts):
        model = nnx.merge(self._graph, state)
        hidden, cache = model(texts.last[:, None], texts.running[:, None], texts.cache)
        return self._next(model, hidden[:, 0], cache, texts.running, texts.key)

    def _next(self, model, hidden, cache, running, key):
        key, now = jax.random.split(key)
        token = self._choose(now, model.logits(hidden))
        for stop in model.settings.stop_ids:
            running &= token != stop
        return Texts(cache, token, running, key)
