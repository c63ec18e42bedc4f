"""On CPU: dispatch and combine against the same contract over dense ``lax.all_to_all``."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib

import jax

import freeio_jax
from freeio_jax.bench import cases, timing
from freeio_jax.bench.report import Report

DEFAULTS = {"tokens": (128, 256, 512, 1024), "hidden": 1024, "top_k": 8, "num_experts": 64}


def measure(arguments: argparse.Namespace) -> list[dict]:
    """One row for each T and operation: seconds of both implementations and their ratio."""
    results = []
    for num_tokens in arguments.tokens:
        shape = cases.Shape(
            num_ranks=arguments.ranks,
            num_tokens=num_tokens,
            hidden=arguments.hidden,
            top_k=arguments.top_k,
            num_experts=arguments.num_experts,
            dtype=arguments.dtype,
            capacity_factor=arguments.capacity_factor,
        )
        engine = cases.operations(shape, freeio_jax)
        baseline = cases.operations(shape, freeio_jax.reference)
        for name in engine:
            seconds = timing.compare(
                {"engine": engine[name], "baseline": baseline[name]}, arguments.repeats
            )
            results.append(
                {
                    **dataclasses.asdict(shape),
                    "operation": name,
                    "engine_s": seconds["engine"],
                    "all_to_all_s": seconds["baseline"],
                    "ratio": seconds["engine"] / seconds["baseline"],
                }
            )
            print(format_row(results[-1]), flush=True)
    return results


HEADER = f"{'T':>6}  {'operation':<17}{'freeio_jax ms':>14}{'all_to_all ms':>15}{'ratio':>8}"


def format_row(row: dict) -> str:
    return (
        f"{row['num_tokens']:>6}  {row['operation']:<17}{row['engine_s'] * 1e3:>14.1f}"
        f"{row['all_to_all_s'] * 1e3:>15.1f}{row['ratio']:>8.2f}"
    )


def print_growth(results: list[dict]) -> None:
    """Time per token relative to that at the largest T: flat means linear in T."""
    tokens = sorted({row["num_tokens"] for row in results})
    if len(tokens) < 2:
        return
    print("\nfreeio_jax, time per token relative to the largest T (1.0 throughout: linear in T)")
    print(f"{'operation':<17}" + "".join(f"{f'T={t}':>10}" for t in tokens))
    for name in dict.fromkeys(row["operation"] for row in results):
        per_token = {
            row["num_tokens"]: row["engine_s"] / row["num_tokens"]
            for row in results
            if row["operation"] == name
        }
        print(
            f"{name:<17}"
            + "".join(f"{per_token[t] / per_token[tokens[-1]]:>10.2f}" for t in tokens)
        )


def plot(results: list[dict], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["operation"] for row in results))
    figure, axes = pyplot.subplots(1, len(names), figsize=(4.2 * len(names), 3.6), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        rows = [row for row in results if row["operation"] == name]
        tokens = [row["num_tokens"] for row in rows]
        for key, label, marker in (
            ("all_to_all_s", "dense all_to_all", "s"),
            ("engine_s", "freeio_jax", "o"),
        ):
            axis.plot(tokens, [row[key] * 1e3 for row in rows], marker=marker, label=label)
        axis.set(title=name, xlabel="tokens per rank", ylabel="ms", xscale="log", yscale="log")
        axis.set_xticks(tokens, [str(t) for t in tokens], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def set_defaults(arguments: argparse.Namespace) -> None:
    """Where the command line says nothing else."""
    for name, value in DEFAULTS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.dtype = arguments.dtype or "float32"


def run(report: Report, arguments: argparse.Namespace) -> None:
    """Measures, prints, and keeps the rows as the part ``cpu`` of the record."""
    set_defaults(arguments)
    capacity = (
        "dropless capacity"
        if arguments.capacity_factor is None
        else f"capacity {arguments.capacity_factor:g} x T*K"
    )
    print(
        f"{arguments.ranks} {jax.devices()[0].platform} devices, jax {jax.__version__}, "
        f"H={arguments.hidden} K={arguments.top_k} E={arguments.num_experts} {arguments.dtype}, "
        f"{capacity}, median of {arguments.repeats}\n{HEADER}"
    )
    results = measure(arguments)
    print_growth(results)
    report.data["cpu"] = results
    report.save()
    if arguments.png:
        plot(results, arguments.png)
