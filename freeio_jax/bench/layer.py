"""One MoE layer end to end, over each exchange: tokens per second, and the exchange's share."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from freeio_jax.bench import baselines, profile, timing
from freeio_jax.bench.cases import Shape, expert_mesh, uniform_routing
from freeio_jax.bench.programs import Programs, per_shard, put
from freeio_jax.bench.report import Report
from freeio_jax.flax.config import MoEConfig
from freeio_jax.flax.experts import SwiGLU
from freeio_jax.flax.moe import moe
from freeio_jax.grouped_matmul import use
from freeio_jax.info import info
from freeio_jax.layout import balanced_capacity

#: Room of a rank, and with dense slots of a pair of ranks, as a multiple of an even load.
ROOM = 1.25


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The layer, and the tokens of one rank."""

    num_ranks: int
    num_tokens: int
    hidden: int = 7168
    top_k: int = 8
    num_experts: int = 256
    expert_width: int = 2048
    dtype: str = "bfloat16"
    shared_width: int | None = None


class Bound:
    """A compiled program with its arguments: call it.

    Attributes:
      temporary_bytes: of one device, what XLA plans beside arguments and results.
    """

    def __init__(self, compiled: Any, args: Sequence[Any]):
        self.compiled, self.args = compiled, args
        planned = compiled.memory_analysis()
        self.temporary_bytes = planned.temp_size_in_bytes if planned else math.nan

    def __call__(self) -> Any:
        return self.compiled(*self.args)


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A program that is to be compiled, in any thread, and its arguments."""

    lowered: Any
    args: Sequence[Any]

    def compile(self) -> Bound:
        return Bound(self.lowered.compile(), self.args)


class Layer:
    """The layer's parameters and input on the mesh, and its functions for any exchange."""

    def __init__(self, sizes: Sizes, room: float = ROOM):
        self.sizes, self.room = sizes, room
        self.mesh = expert_mesh(sizes.num_ranks)
        dtype = jnp.dtype(sizes.dtype)
        config, hidden = self.config(None), sizes.hidden
        shapes = config.parameters(hidden, {"expert": sizes.num_ranks})

        def normal(key, shape, dtype):
            return jax.random.normal(key, shape, dtype) * jnp.asarray(shape[0] ** -0.5, dtype)

        def draw(key):
            """One rank's part, expert by expert: the generator needs several times their memory."""
            keys = dict(zip(["x", *shapes], jax.random.split(key, 1 + len(shapes)), strict=True))
            arrays = {}
            for name, (shape, _) in shapes.items():
                if name not in config.spread_parameters(hidden):
                    of = jnp.float32 if name == "router" else dtype
                    arrays[name] = normal(keys[name], shape, of)
                    continue
                one = functools.partial(normal, shape=shape[1:], dtype=dtype)
                keys_of_rank = jax.random.split(own(keys[name]), shape[0])
                arrays[name] = jax.lax.map(lambda k, one=one: one(k), keys_of_rank)
            x = jax.random.normal(own(keys["x"]), (sizes.num_tokens, hidden), dtype)
            return arrays, x

        def own(key):
            return jax.random.fold_in(key, jax.lax.axis_index("expert"))

        specs = {name: P(*names) for name, (_, names) in shapes.items()}
        draw = jax.shard_map(draw, mesh=self.mesh, in_specs=P(), out_specs=(specs, P("expert")))
        self.parameters, self.x = jax.jit(draw)(jax.random.key(0))

    def config(self, exchange: object, **options: Any) -> MoEConfig:
        """``options`` are further fields of the configuration."""
        sizes = self.sizes
        return MoEConfig(
            num_experts=sizes.num_experts,
            top_k=sizes.top_k,
            expert_width=sizes.expert_width,
            shared_expert_width=sizes.shared_width,
            capacity_factor=self.room,
            drops="last",  # nothing is dropped, and no rule is to be timed
            dtype=jnp.dtype(sizes.dtype),
            exchange=exchange,
            **options,
        )

    def forward(self, exchange: object, **options: Any) -> Lowered:
        """Of parameters and input: y and the report."""
        config = self.config(exchange, **options)
        return self._lower(lambda parameters, x: moe(parameters, x, config, mesh=self.mesh))

    def backward(self, exchange: object, **options: Any) -> Lowered:
        """Of parameters and input: the loss with its report, and the gradients of both."""
        config = self.config(exchange, **options)

        def loss(parameters, x):
            y, report = moe(parameters, x, config, mesh=self.mesh)
            return jnp.mean(y.astype(jnp.float32) ** 2) + report.aux_loss, report

        return self._lower(jax.value_and_grad(loss, (0, 1), has_aux=True))

    def _lower(self, function) -> Lowered:
        args = (self.parameters, self.x)
        return Lowered(jax.jit(function).lower(*args), args)

    def experts(self, gradients: bool) -> Lowered:
        """The layer's experts without its exchanges, on like routing."""
        shape, topk_idx, capacity = self._routing()
        groups = np.bincount(topk_idx.ravel(), minlength=shape.num_experts)
        ends = np.minimum(np.cumsum(groups.reshape(shape.num_ranks, -1), axis=1), capacity)
        sizes = np.diff(ends, axis=1, prepend=0).astype(np.int32).reshape(-1)
        sizes = put(self.mesh, sizes)

        def draw(key):
            key = jax.random.fold_in(key, jax.lax.axis_index("expert"))
            return jax.random.normal(key, (capacity, shape.hidden), jnp.dtype(shape.dtype))

        draw = jax.shard_map(draw, mesh=self.mesh, in_specs=P(), out_specs=P("expert"))
        rows = jax.jit(draw)(jax.random.key(1))
        config = self.config(None)
        names = config.spread_parameters(shape.hidden)

        def multiply(rows, x, parameters, sizes):
            def both(parameters, rows, x):
                y = SwiGLU()({name: parameters[name] for name in names}, rows, sizes)
                if config.shared_expert_width is None:
                    return y, x
                shared = {name: parameters[f"shared_{name}"] for name in names}
                return y, SwiGLU().shared(shared, x)

            y, pull = jax.vjp(both, parameters, rows, x)
            return pull(y) if gradients else y

        parameters = {n: a for n, a in self.parameters.items() if n != "router"}
        by_rank = P("expert")
        specs = {name: by_rank if name in names else P() for name in parameters}
        # A gradient by what all ranks have, as the shared expert, is a sum over them.
        outs = (specs, by_rank, by_rank) if gradients else by_rank
        multiply = jax.shard_map(
            multiply, mesh=self.mesh, in_specs=(by_rank, by_rank, specs, by_rank), out_specs=outs
        )
        args = (rows, self.x, parameters, sizes)
        return Lowered(jax.jit(multiply).lower(*args), args)

    def _routing(self):
        """Shape, ids and capacity of exchanges like the layer's."""
        sizes = self.sizes
        shape = Shape(
            sizes.num_ranks,
            sizes.num_tokens,
            sizes.hidden,
            sizes.top_k,
            sizes.num_experts,
            sizes.dtype,
        )
        capacity = balanced_capacity(
            self.room,
            num_ranks=sizes.num_ranks,
            num_tokens=sizes.num_tokens,
            top_k=sizes.top_k,
            num_experts=sizes.num_experts,
            alignment=1,
        )
        topk_idx = uniform_routing(shape, seed=0).reshape(sizes.num_ranks, sizes.num_tokens, -1)
        return shape, topk_idx, capacity

    def alone(self, exchange: object, gradients: bool) -> Lowered:
        """The layer's exchanges without its experts, on like routing."""
        shape, topk_idx, capacity = self._routing()
        inputs = Programs(self.mesh, shape, topk_idx, capacity)

        def exchanges(tokens, topk_idx, weights):
            def both(tokens, weights):
                out = inputs.dispatch_once(exchange, tokens, topk_idx)
                return exchange.combine(out.tokens, out.handle, weights)

            if not gradients:
                return both(tokens, weights)
            z, pull = jax.vjp(both, tokens, weights)
            return pull(z)

        args = (inputs.tokens, inputs.topk_idx, inputs.weights)
        return Lowered(per_shard(exchanges, self.mesh).lower(*args), args)


_COLUMNS = {
    "num_tokens": "T",
    "pass": "pass",
    "exchange": "exchange",
    "product": "experts by",
    "wall_s": "wall ms",
    "tokens_per_s": "tokens/s",
    "alone_s": "exchanges alone ms",
    "experts_s": "experts alone ms",
    "alone_share": "alone / layer %",
    "communication_share": "kernels that communicate / span %",
    "dropped": "dropped",
}


def run(
    report: Report,
    all_sizes: Sequence[Sizes],
    exchanges: Sequence[str],
    products: Sequence[str | None] = (None,),
) -> None:
    """Times the layer, forward alone and with all gradients, for each size, exchange and product.

    ``products``: what multiplies the experts' rows; None: what is chosen.
    """
    chosen = info()["grouped matmul"]
    print("\n# grouped matmul", *chosen.splitlines(), sep="\n#   ", flush=True)
    report.data["about"]["grouped_matmul"] = chosen
    report.table("MoE layer", _COLUMNS)
    for sizes in all_sizes:
        layer = Layer(sizes)
        for name, product, gradients in itertools.product(exchanges, products, (False, True)):
            about = {
                **dataclasses.asdict(sizes),
                "exchange": name,
                "product": product or "chosen",
                "pass": "forward + backward" if gradients else "forward",
            }

            def measure(name=name, product=product, gradients=gradients, layer=layer):
                with use(product):
                    return _measure(layer, baselines.named(name), gradients)

            report.guarded("layer", about, measure)


def _measure(layer: Layer, exchange: object, gradients: bool) -> dict[str, object]:
    whole = layer.backward(exchange) if gradients else layer.forward(exchange)
    lowered = whole, layer.alone(exchange, gradients), layer.experts(gradients)
    with ThreadPoolExecutor() as pool:
        step, alone, experts = pool.map(Lowered.compile, lowered)
    results = step()
    dropped = int((results[0][1] if gradients else results[1]).dropped)
    del results
    wall = timing.seconds_per_run(step, least=0.3)
    alone_s = timing.seconds_per_run(alone)
    tokens = layer.sizes.num_ranks * layer.sizes.num_tokens
    record = {
        "wall_s": wall,
        "tokens_per_s": tokens / wall,
        "alone_s": alone_s,
        "alone_share": alone_s / wall,
        "experts_s": timing.seconds_per_run(experts),
        "dropped": dropped,
        "communication_share": math.nan,
    }
    events = profile.record(step)
    return record | profile.shares(events) | {"kernels_s": profile.longest(events)}
