"""The plan as text, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np

from freeio_jax.plan.plan import Plan
from freeio_jax.plan.rates import Rates
from freeio_jax.plan.traffic import OPERATIONS, Traffic


def _table(rows: list[list[str]]) -> str:
    """As Markdown, columns aligned; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _mega(number) -> str:
    return f"{number / 1e6:.1f}"


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}" if seconds < 1e-4 else f"{seconds * 1e6:.0f}"


def words(plan: Plan, rates: Rates, about: str) -> str:
    """The plan as text."""
    pod = plan.pod
    parts = [
        f"{pod.num_hosts} host(s) of {pod.num_gpus} GPUs, T={pod.num_tokens} K={pod.top_k} "
        f"E={pod.num_experts}, rows of {plan.row_bytes} bytes, {about}, "
        f"{plan.capacity} packed rows on a rank",
        str(rates),
        *(f"Not with this installation's CUDA engine: {reason}." for reason in plan.beyond),
    ]
    heading = ["operation", "NVLink out MB", "in", "network out MB", "in", "memory MB"]
    rows = [[*heading, "floor us", "by", "predicted us", "x floor"]]
    for op in OPERATIONS:
        moved, prediction = plan.moved[op], plan.predictions[op]
        ways = (moved.link_out, moved.link_in, moved.network_out, moved.network_in, moved.memory)
        rows.append(
            [
                op + (" (in lines)" if prediction.small else ""),
                *(_mega(way.max()) for way in ways),
                _micro(prediction.floor),
                prediction.limit,
                _micro(prediction.seconds),
                f"{prediction.seconds / prediction.floor:.2f}",
            ]
        )
    parts.append("On the rank that has most:\n" + _table(rows))
    if pod.num_hosts > 1:
        rails = plan.rails
        parts.append(
            "Network, the busiest link of dispatch: "
            f"{_mega(rails['busiest_same'])} MB with the same local ranks, "
            f"{_mega(rails['busiest_even'])} MB with even rails, at least "
            f"{_mega(rails['lower_bound'])} MB. Even rails forward "
            f"{_mega(rails['forwarded'])} MB of all ranks over NVLink."
        )
    held = plan.memory
    parts.append(
        f"Memory of each GPU: the engine {_mega(held.engine)} MB"
        + (f", windows for other hosts {_mega(held.windows)} MB" if pod.num_hosts > 1 else "")
        + f"; of XLA's, while they run, dispatch {_mega(held.dispatch_scratch)} MB and combine "
        f"{_mega(held.combine_scratch)} MB; dispatch's result {_mega(held.packed_rows)} MB."
    )
    return "\n\n".join(parts)


def words_per_rank(plan: Plan) -> str:
    """The bytes of each rank in dispatch, as text."""
    fields = ("link_out", "link_in", "network_out", "network_in", "loaded", "stored")
    rows = [["rank", *(f"{field.replace('_', ' ')} MB" for field in fields)]]
    columns = [getattr(plan.moved["dispatch"], field) for field in fields]
    rows += [
        [str(rank), *(_mega(number) for number in numbers)]
        for rank, numbers in enumerate(zip(*columns, strict=True))
    ]
    return "dispatch, rank by rank:\n" + _table(rows)


def numbers(plan: Plan, rates: Rates, routing: str) -> dict:
    """For JSON: bytes and seconds."""
    moved = {
        op: {name: getattr(t, name).tolist() for name in Traffic.__dataclass_fields__}
        for op, t in plan.moved.items()
    }
    return {
        "routing": routing,
        **dataclasses.asdict(plan.pod),
        "row_bytes": plan.row_bytes,
        "capacity": plan.capacity,
        "rates": dataclasses.asdict(rates),
        "moved": moved,
        "predictions": {op: dataclasses.asdict(p) for op, p in plan.predictions.items()},
        "rails": plan.rails,
        "memory": dataclasses.asdict(plan.memory),
        "beyond_the_engine": plan.beyond,
    }


def plot(plan: Plan, path: pathlib.Path) -> None:
    """Draws the bytes of each rank in dispatch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    moved = plan.moved["dispatch"]
    figure, axes = pyplot.subplots(2, 1, sharex=True, figsize=(8, 5), layout="constrained")
    rank = np.arange(plan.pod.num_ranks)
    for axis, kind in zip(axes, ("link", "network"), strict=True):
        for way, style in (("out", "o"), ("in", "x")):
            axis.plot(rank, getattr(moved, f"{kind}_{way}") / 1e6, style, label=way, markersize=3)
        axis.set_ylabel({"link": "NVLink MB", "network": "network MB"}[kind])
        axis.set_ylim(bottom=0)
        axis.legend()
    axes[-1].set_xlabel("rank")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
