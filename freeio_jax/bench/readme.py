"""The figures of README and of pages in docs: measured, kept in a record, written as tables.

A page names the record of each of its tables in a comment before it:

    <!-- figures: decode of 2026-11-30_decode.json -->

The record is a JSON file of the benchmark in ``docs/notebook``, and the table is what
:func:`render` makes of it. A test compares them. So no figure is on these pages that was not
measured.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from freeio_jax.bench.report import Report

Data = Mapping[str, Any]
Rows = Iterable[Sequence[object]]

#: Tokens of the tables, by suite.
TOKENS = {
    "large": (1, 8, 128, 1024, 4096, 8192),
    "small": (1, 128, 4096, 8192),
    "zipf": (128, 4096),
}
README_TOKENS = (1, 128, 1024, 4096, 8192)
OPS = ("dispatch", "combine", "combine_transpose", "dispatch_along")
XLAS = ("ragged-by-expert", "ragged", "dense")


def measure(
    report: Report,
    *,
    devices: Sequence[jax.Device],
    dtype: str,
    stamped: Sequence[Mapping[str, Any]] = (),
    png: pathlib.Path | None = None,
) -> None:
    """All parts that the tables of README and docs/performance.md show, on these GPUs.

    One record has them all.

    ``stamped``, ``png``: of :func:`freeio_jax.bench.tax.run`.
    """
    # The tables are written without the parts, and these import much.
    from freeio_jax.bench import decode, experts, layer, scaling, shapes, tax
    from freeio_jax.bench.floor import Limits

    limits = Limits.measure(devices)
    report.data["about"]["limits"] = dataclasses.asdict(limits)
    sizes = {"num_ranks": len(devices), "dtype": dtype}

    def suite(name, tokens):
        return dataclasses.replace(shapes.SUITES[name], tokens=tokens)

    ours = [suite(name, tokens) for name, tokens in TOKENS.items()]
    shapes.run(report, limits, ours, ops=OPS, exchanges=["freeio"], **sizes)
    xlas = [suite("large", README_TOKENS)]
    both = ("dispatch", "combine")
    shapes.run(report, limits, xlas, ops=both, exchanges=XLAS, **sizes)
    decode.run(report, suite("large", decode.TOKENS), **sizes)
    tax.run(
        report,
        [suite("large", (128, 4096))],
        devices=devices,
        numbers_of_ranks=scaling.numbers_of_ranks(len(devices)),
        exchanges=["freeio", *XLAS],
        dtype=dtype,
        stamped=stamped,
        png=png,
    )
    experts.run(report, dtype=dtype, products=["hopper", "tokamax"])
    layer.run(report, [layer.Sizes(num_tokens=4096, **sizes)], ["freeio"], [None, "tokamax"])


def print_tables(data: Data, name: str) -> None:
    """All tables that the record ``name`` has, as they go into the pages."""
    for table in TABLES:
        lines = render(table, data)
        if len(lines) > 2:
            print("\n".join(["", marker(table, name), *lines]), flush=True)


def marker(table: str, name: str) -> str:
    return f"<!-- figures: {table} of {name} -->"


MARKER = re.compile(r"^<!-- figures: (\w+) of (\S+) -->$", re.MULTILINE)


def render(table: str, data: Data) -> list[str]:
    """The lines of a table in Markdown, made of the record ``data``.

    Raises:
      KeyError: there is no such table.
    """
    headings, rows = TABLES[table]
    lines = [headings, ["---"] * len(headings), *rows(data)]
    return [
        f"| {' | '.join(map(str, line))} |" if i != 1 else "|" + "---|" * len(line)
        for i, line in enumerate(lines)
    ]


def figures_outside_tables(text: str) -> list[str]:
    """Figures with a unit in a page's prose, or in a table without a record; code is left out."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^    .*$|`[^`]*`", "", text, flags=re.MULTILINE)
    text = re.sub(r"(?m)^<!-- figures: .* -->\n(\|.*\n)+", "", text)
    return re.findall(r"\d[\d.,]* ?(?:us|ms|GB/s|TFLOP/s|tokens/s|x floor)\b", text)


# --- Cells ---------------------------------------------------------------------------------------


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:.1f}" if abs(value) < 99.95 else f"{value:.0f}"


def _us(seconds: float | None) -> str:
    return _number(None if seconds is None else seconds * 1e6)


def _share(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.2f}"


# --- Exchanges -----------------------------------------------------------------------------------


def _shapes(data: Data, **fields) -> list[Mapping[str, Any]]:
    return [r for r in data.get("shapes", []) if all(r.get(k) == v for k, v in fields.items())]


def _only(records, field):
    """The value that the records have in the field; None: none has it."""
    found = [r[field] for r in records if r.get(field) is not None]
    return found[0] if found else None


#: The operation of a record that has the time of both, where they were not kept apart.
BOTH = "dispatch and combine"


def _wall_of_both(data: Data, exchange: str, num_tokens: int) -> float | None:
    here = _shapes(data, name="large", exchange=exchange, num_tokens=num_tokens)
    both = _only([r for r in here if r["op"] == BOTH], "wall_s")
    if both is not None:
        return both
    times = [_only([r for r in here if r["op"] == op], "wall_s") for op in OPS[:2]]
    return None if None in times else sum(times)


def _fastest_of_xla(data: Data, num_tokens: int) -> tuple[float, str]:
    """Wall time of both, and which exchange it was, XLA's newest ones in one process included."""
    found = [(_wall_of_both(data, name, num_tokens), name) for name in XLAS]
    newest: dict[str, list[float]] = {}
    for record in data.get("newest", []):
        at = record["processes"], record.get("name"), record.get("num_tokens")
        if at == (1, "large", num_tokens):
            name = f"{record['exchange']}, {record['options']}"
            newest.setdefault(name, []).append(record.get("wall_s") or math.nan)
    found += [(sum(times), name) for name, times in newest.items() if len(times) == 2]
    return min(
        ((s, n) for s, n in found if s is not None and math.isfinite(s)), default=(math.nan, "")
    )


def _readme_rows(data: Data) -> Rows:
    for t in README_TOKENS:
        here = _shapes(data, name="large", exchange="freeio", num_tokens=t)
        if not here:
            continue
        kernels = [_us(_only([r for r in here if r["op"] == op], "kernel_s")) for op in OPS[:2]]
        floor = _us(_only([r for r in here if r["op"] == "dispatch"], "floor_s"))
        seconds, name = _fastest_of_xla(data, t)
        cells = (*kernels, floor, _us(_wall_of_both(data, "freeio", t)))
        yield t, *(f"{cell} us" for cell in cells), f"{_us(seconds)} us ({name})"


def _operation_rows(data: Data) -> Rows:
    for name, tokens in TOKENS.items():
        for t in tokens:
            cells, floor = [], None
            for op in OPS:
                here = _shapes(data, name=name, exchange="freeio", num_tokens=t, op=op)
                kernel, ratio = _only(here, "kernel_s"), _only(here, "ratio")
                floor = floor or _only(here, "floor_s")
                cells.append(_us(kernel) + (f" ({ratio:.2f})" if ratio else ""))
            if any(cells):
                yield name, t, _us(floor), *cells


def _xla_rows(data: Data) -> Rows:
    for t in README_TOKENS:
        ours = _wall_of_both(data, "freeio", t)
        xlas = [_wall_of_both(data, name, t) for name in XLAS]
        if ours is None or None in xlas:
            continue
        yield t, *map(_us, (ours, *xlas)), _share(ours / _fastest_of_xla(data, t)[0])


def _limit_rows(data: Data) -> Rows:
    limits = data["about"].get("limits") or {}
    if limits.get("push") is not None:
        rates = (limits.get(name) for name in ("push", "pull", "memory"))
        rates = ["" if rate is None else f"{rate * 1e-9:.0f}" for rate in rates]
        yield *rates, f"{limits['trip'] * 1e6:.2f}"


# --- Models --------------------------------------------------------------------------------------


def _decode_rows(data: Data) -> Rows:
    fields = ("kernels_s", "span_s", "in_a_row_s", "wall_s", "host_of_call_s")
    records = [r for r in data.get("decode", []) if r["command_buffers"] == "on"]
    most = max((r["num_tokens"] for r in records), default=0)
    # Of the controls the one that is most like an exchange.
    control = "two empty kernels, the exchange's rows", most
    for record in records:
        program, num_tokens = record["program"], record["num_tokens"]
        if program == "exchange" or (program, num_tokens) == control:
            program = "dispatch and combine" if program == "exchange" else program
            yield program, num_tokens, *(_us(record.get(field)) for field in fields)


#: Of the table of the experts' product.
_FEWEST_ROWS = 8192


def _expert_rows(data: Data) -> Rows:
    # With few rows the weights' bytes decide, not the products.
    records = [r for r in data.get("experts", []) if r["num_rows"] >= _FEWEST_ROWS]
    products = list(dict.fromkeys(r["product"] for r in records))

    def cell(shape, product, by):
        here = [r for r in records if (r["shape"], r["product"]) == (shape, product)]
        for record in here:
            # A measurement that failed is of no implementation.
            if record.get("by", "").startswith(by):
                share = _share(record.get("of_dense"))
                return "wrong" if record["verdict"].startswith("WRONG") else share
        return "failed" if any("error" in record for record in here) else ""

    for shape in dict.fromkeys(r["shape"] for r in records):
        ours = [cell(shape, product, "hopper") for product in products]
        others = [cell(shape, product, "tokamax") for product in products]
        if all(ours):
            yield shape, *ours, " / ".join(others)


def _layer_rows(data: Data) -> Rows:
    for r in data.get("layer", []):
        if "wall_s" not in r:
            continue
        alone, experts = (f"{r[name] * 1e3:.2f}" for name in ("alone_s", "experts_s"))
        by = "own product" if r["product"] == "chosen" else r["product"]
        wall, tokens = f"{r['wall_s'] * 1e3:.1f}", f"{round(r['tokens_per_s'], -3):,.0f}"
        yield r["pass"], by, wall, tokens, alone, experts


def _tax_rows(data: Data) -> Rows:
    parts = ("agreement", "routing", "shuffling", "transfer", "rest")
    fields = ("total_s", "ideal_s", "stamped_s", *(f"{part}_s" for part in parts))
    for r in data.get("tax", []):
        if "total_s" in r:
            where = (r["num_ranks"], r["num_tokens"], r["op"], r["exchange"])
            yield *where, *(_us(r.get(field)) for field in fields)


#: Chunks of a layer, of the table of memory.
NUM_CHUNKS = (1, 2, 4)


def _memory_rows(data: Data) -> Rows:
    planned: dict[tuple, dict[int, float]] = {}
    for r in data.get("memory", []):
        if "temporary_bytes" in r:
            of_chunks = planned.setdefault((r["model"], r["num_tokens"], r["pass"]), {})
            of_chunks[r["num_chunks"]] = r["temporary_bytes"]
    for about, of_chunks in planned.items():
        sizes = (of_chunks.get(n) for n in NUM_CHUNKS)
        yield *about, *("" if size is None else f"{size * 1e-6:.0f}" for size in sizes)


def _cpu_rows(data: Data) -> Rows:
    ratios: dict[int, list[float]] = {}
    for record in data.get("cpu", []):
        ratios.setdefault(record["num_tokens"], []).append(record["ratio"])
    for t, of_ops in ratios.items():
        yield t, *map(_share, of_ops)


_OF_OPS = tuple(f"{op} us" for op in OPS)
#: Headings, and what makes the rows of a record's data.
TABLES: dict[str, tuple[Sequence[str], Callable[[Data], Rows]]] = {
    "readme": (
        ("T", "dispatch kernel", "combine kernel", "floor", "both, wall", "XLA's fastest, wall"),
        _readme_rows,
    ),
    "tax": (
        (
            *("GPUs", "T", "operation", "exchange", "total us", "ideal us", "with stamps us"),
            *("agreement us", "routing us", "shuffling us", "transfer us", "rest us"),
        ),
        _tax_rows,
    ),
    "limits": (
        ("link, stores GB/s", "link, loads GB/s", "device copy GB/s", "flag trip us"),
        _limit_rows,
    ),
    "operations": (("shape", "T", "floor us", *_OF_OPS), _operation_rows),
    "xla": (("T", "freeio", *XLAS, "freeio / XLA's fastest"), _xla_rows),
    "decode": (
        ("program", "T", "kernels", "span", "in a row", "wall", "host of a call"),
        _decode_rows,
    ),
    "experts": (
        (
            *("M x K x N, groups", "forward", "gradient of rows", "gradient of weights"),
            "tokamax, as shipped",
        ),
        _expert_rows,
    ),
    "layer": (
        (
            *("pass", "experts by", "wall ms", "tokens/s", "exchanges alone ms"),
            "experts alone ms",
        ),
        _layer_rows,
    ),
    "memory": (("layer", "T", "pass", *(f"n={n}" for n in NUM_CHUNKS)), _memory_rows),
    "cpu": (("T", "dispatch", "combine", "both with gradients"), _cpu_rows),
}


def records_in(text: str) -> list[tuple[str, str, list[str]]]:
    """(table, record's name, lines of the table) of each marker in a page."""
    found = []
    for match in MARKER.finditer(text):
        lines = text[match.end() :].lstrip("\n").split("\n")
        end = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
        found.append((match[1], match[2], lines[:end]))
    return found
