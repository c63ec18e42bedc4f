"""The experts' product: each implementation at hand, right or wrong, and against a dense product.

A shape is M rows in G groups, multiplied with ``[G, K, N]``. The dense product is of the same size:
all rows times one matrix, or one ``rows.T @ cotangents``. All programs are compiled first. Then
each takes turns with the dense product, and with no other. A GPU slows down under load, within
milliseconds: what runs after a slow program, or after a pause, is faster by a tenth. In such a pair
both run under the same load.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from freeio_jax.bench import processes
from freeio_jax.bench.report import Report
from freeio_jax.grouped_matmul import Product, choice, ragged, trial

#: Seconds of one turn, at least, and pairs of turns; the median counts.
TURN, TURNS = 0.02, 8


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows, widths, groups, and how the rows spread over the groups: even, random or Zipf."""

    num_rows: int
    k: int
    n: int
    num_groups: int
    spread: str

    def __str__(self):
        return f"{self.num_rows} x {self.k} x {self.n}, {self.num_groups} {self.spread}"

    def sizes(self) -> np.ndarray:
        """Rows of each group, int32 ``[G]``: of routing drawn with weights 1, or 1/n, shuffled."""
        if self.spread == "even":
            return np.full(self.num_groups, self.num_rows // self.num_groups, np.int32)
        rng = np.random.default_rng(self.num_groups)
        weights = np.ones(self.num_groups)
        if self.spread == "zipf":
            weights = rng.permutation(1 / np.arange(1, self.num_groups + 1))
        return rng.multinomial(self.num_rows, weights / weights.sum()).astype(np.int32)

    def operands(self, dtype) -> dict[str, jax.Array]:
        """Rows a, cotangents b, weights w: normal numbers."""
        shapes = {
            "a": (self.num_rows, self.k),
            "b": (self.num_rows, self.n),
            "w": (self.num_groups, self.k, self.n),
        }

        def draw(key, shape):
            if len(shape) == 2:
                return jax.random.normal(key, shape, dtype)
            keys = jax.random.split(key, shape[0])
            return lax.map(lambda key: jax.random.normal(key, shape[1:], dtype), keys)

        draw = jax.jit(draw, static_argnums=1)
        return {
            name: draw(jax.random.key(i), shape) for i, (name, shape) in enumerate(shapes.items())
        }


#: The shapes of docs/performance.md: the two products of layers, fine and coarse experts, decode.
SHAPES = tuple(
    Shape(*sizes, spread)
    for sizes, spreads in (
        ((32768, 7168, 4096, 64), ("even", "random", "zipf")),
        ((32768, 2048, 7168, 64), ("random",)),
        ((32768, 7168, 2048, 64), ("random",)),
        ((8192, 7168, 4096, 32), ("random",)),
        ((32768, 2048, 2816, 16), ("random",)),
        ((1024, 7168, 4096, 64), ("zipf",)),
    )
    for spread in spreads
)

#: Where there are no GPUs.
SMALL = (Shape(512, 128, 256, 8, "even"), Shape(512, 128, 256, 8, "zipf"))

_COLUMNS = {
    "shape": "M x K x N, groups",
    "product": "product",
    "by": "implementation",
    "verdict": "verdict",
    "seconds": "ms",
    "tflops": "TFLOP/s",
    "dense_tflops": "dense product, TFLOP/s",
    "of_dense": "of dense",
    "weights_rate": "weights GB/s",
}


def _dense(product: Product):
    """One dense product of as many numbers."""
    if product == Product.WEIGHTS_GRADIENT:
        return lambda a, b, _: lax.dot_general(a, b, (((0,), (0,)), ((), ())))
    dimensions = ((1,), (1 if product == Product.ROWS_GRADIENT else 0,))
    return lambda rows, w, _: lax.dot_general(rows, w[0], (dimensions, ((), ())))


#: The dense products of all groups in one call, where the groups are equal: what XLA makes of as
#: many numbers with no rows to look for.
BATCHED = "batched"


def _batched(product: Product, num_groups: int):
    def by_group(a):
        return a.reshape(num_groups, -1, a.shape[-1])

    if product == Product.WEIGHTS_GRADIENT:
        return lambda a, b, _: jnp.einsum("gmk,gmn->gkn", by_group(a), by_group(b))
    spec = "gmn,gkn->gmk" if product == Product.ROWS_GRADIENT else "gmk,gkn->gmn"
    return lambda rows, w, _: jnp.einsum(spec, by_group(rows), w).reshape(rows.shape[0], -1)


def _compiled(function, *args):
    return jax.jit(function).lower(*args).compile()


def _seconds(dense, other) -> tuple[float, float]:
    """Median time of each; they take turns, and each is the first one in every second pair."""

    def turn(run, count):
        begin = time.perf_counter()
        for _ in range(count):
            result = run()
        jax.block_until_ready(result)
        return (time.perf_counter() - begin) / count

    programs = (dense, other)
    for run in programs:
        jax.block_until_ready(run())
    counts = [1 + int(TURN / turn(run, 1)) for run in programs]
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(TURNS + 1):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            times[which].append(turn(programs[which], counts[which]))
    # The first pair warms the GPU up.
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def run(
    report: Report,
    shapes=None,
    dtype="bfloat16",
    png: pathlib.Path | None = None,
    products: Sequence[str] | None = None,
) -> None:
    """Times each product of each shape by each implementation of this platform.

    ``products``: names of implementations, and no others; None: all. Of several processes the first
    one times them on one of its devices, and the others wait.
    """
    if processes.is_first():
        _run(report, shapes, dtype, png, products)
    processes.share(None)


def _run(report, shapes, dtype, png, products):
    backend = jax.default_backend()
    platform = "cuda" if backend == "gpu" else backend
    shapes = shapes or (SHAPES if backend == "gpu" else SMALL)
    report.table("The experts' product", _COLUMNS)
    compiled = {}
    for shape in shapes:
        operands = shape.operands(jnp.dtype(dtype))
        # Shapes that differ in the spread alone have the same programs.
        key = (shape.num_rows, shape.k, shape.n, shape.num_groups)
        if key not in compiled:
            compiled = {key: _compile_all(operands, platform, products)}
        sizes = jnp.asarray(shape.sizes())
        for product in Product:
            args = (*(operands[name] for name in product.operands), sizes)
            report.guarded_all(
                "experts",
                {"shape": str(shape), "product": product.value, **dataclasses.asdict(shape)},
                lambda product=product, args=args, shape=shape, found=compiled[key][product]: (
                    _records(product, args, shape, found)
                ),
            )
    if png is not None:
        plot(report.data["experts"], png)


def _compile_all(operands, platform, names):
    """For each product and implementation a program, or why there is none, in words."""
    num_groups = operands["w"].shape[0]
    sizes = jnp.zeros(num_groups, jnp.int32)
    candidates = choice.CANDIDATES.get(platform, (choice.RAGGED_DOT,))
    candidates = [c for c in candidates if names is None or c.name in names]
    jobs, found = {}, {product: {} for product in Product}
    with ThreadPoolExecutor() as executor:
        for product in Product:
            args = (*(operands[name] for name in product.operands), sizes)
            functions = {"dense": _dense(product)}
            if operands["a"].shape[0] % num_groups == 0:
                functions[BATCHED] = _batched(product, num_groups)
            for candidate in candidates:
                name = candidate.name
                why = candidate.obstacle(product, args[0].dtype, product.widths(*args[:2]))
                if why:
                    found[product][name] = why
                else:
                    functions[name] = _as_shipped(product, candidate)
            for name, function in functions.items():
                jobs[product, name] = executor.submit(_compiled, function, *args)
    for (product, name), job in jobs.items():
        try:
            found[product][name] = job.result()
        except Exception as error:  # the others can be measured
            found[product][name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return found


def _as_shipped(product, candidate):
    """``(left, right, group_sizes)``: the product; tokamax's without what this package adds."""
    if candidate is not choice.TOKAMAX:
        return trial.evaluate(product, candidate.name)
    return trial.per_shard(functools.partial(ragged.by_tokamax, product, guarded=False))


def _records(product, args, shape, found):
    """A record for each implementation, with the dense product's time in the same turns."""
    found = {name: of for name, of in found.items() if name != BATCHED or shape.spread == "even"}
    verdicts = {name: why for name, why in found.items() if isinstance(why, str)}
    programs = {}
    for name, program in found.items():
        if name in verdicts:
            continue
        programs[name] = lambda program=program: program(*args)
        if name != "dense":
            off = float(trial.error(product, program(*args), *args))
            verdicts[name] = "right" if off <= trial.TOLERANCE else f"WRONG by {off:.2g}"
    operations = 2 * shape.num_rows * shape.k * shape.n
    weights = shape.num_groups * shape.k * shape.n * args[0].dtype.itemsize
    dense = programs.pop("dense")
    seconds = {name: _seconds(dense, program) for name, program in programs.items()}
    for name, verdict in verdicts.items():
        record = {"by": choice.version(name), "verdict": verdict}
        if name in seconds:
            of_dense, own = seconds[name]
            record |= {
                "seconds": own,
                "dense_seconds": of_dense,
                "tflops": operations / own * 1e-12,
                "dense_tflops": operations / of_dense * 1e-12,
                "of_dense": of_dense / own,
                "weights_rate": weights / own,
            }
        yield record


def plot(records, path: pathlib.Path) -> None:
    """Speed of each implementation, a panel for each product, a group of bars for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [record for record in records if "tflops" in record]
    names = list(dict.fromkeys(record["by"] for record in records))
    shapes = list(dict.fromkeys(record["shape"] for record in records))
    figure, panels = pyplot.subplots(3, 1, figsize=(1.6 * len(shapes) + 2, 9), sharex=True)
    for axes, product in zip(panels, Product, strict=True):
        for i, name in enumerate(names):
            here = {
                r["shape"]: r for r in records if r["by"] == name and r["product"] == product.value
            }
            places = [s + 0.8 * i / len(names) for s in range(len(shapes)) if shapes[s] in here]
            bars = axes.bar(
                places,
                [here[shape]["of_dense"] for shape in shapes if shape in here],
                0.8 / len(names),
                label=name,
            )
            for bar, shape in zip(bars, (s for s in shapes if s in here), strict=True):
                if here[shape]["verdict"].startswith("WRONG"):
                    bar.set_hatch("xx")
        axes.set(title=f"{product.value} (crossed: wrong)", ylabel="share of a dense product")
        axes.axhline(1, color="black", linewidth=0.5)
        axes.grid(axis="y", alpha=0.3)
    panels[0].legend(fontsize=7)
    ticks = [s + 0.4 * (len(names) - 1) / len(names) for s in range(len(shapes))]
    panels[-1].set_xticks(ticks, [shape.replace(", ", "\n") for shape in shapes], fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
