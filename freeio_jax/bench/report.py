"""Results as they come: printed as tables, and kept in a JSON file, should the time run out."""

from __future__ import annotations

import json
import math
import pathlib
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from freeio_jax.bench.profile import Event


class Report:
    """Collects records by part.

    Args:
      about: what holds for all records.
      path: JSON file, written anew after each record; None for none.
    """

    def __init__(self, about: Mapping[str, Any], path: pathlib.Path | None = None):
        self.data: dict[str, Any] = {"about": dict(about)}
        self.path, self.failed = path, 0
        self._columns: Mapping[str, str] = {}
        self.save()

    def table(self, title: str, columns: Mapping[str, str]) -> None:
        """Begins a table: ``{field: heading}``, headings may end in a unit: us, MB, GB/s, %."""
        self._columns = columns
        print(f"\n## {title}\n\n| {' | '.join(columns.values())} |", flush=True)
        print("|" + "---|" * len(columns), flush=True)

    def add(self, part: str, record: Mapping[str, Any]) -> None:
        """Adds a record, and prints its row of the table."""
        self.data.setdefault(part, []).append(dict(record))
        cells = [_cell(record.get(field), heading) for field, heading in self._columns.items()]
        print(f"| {' | '.join(cells)} |", flush=True)
        self.save()

    def guarded(
        self, part: str, about: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]
    ) -> bool:
        """Adds ``about`` with what ``measure`` finds; an error is reported, and no more."""
        begin = time.perf_counter()
        try:
            record = dict(measure())
        except Exception as error:
            traceback.print_exc()
            self.failed += 1
            record = {"error": f"{type(error).__name__}: {str(error)[:2000]}"}
        self.add(part, {**about, **record, "took_s": round(time.perf_counter() - begin, 2)})
        if "error" in record:
            print(f"\n{record['error'][:300]}\n", flush=True)
        return "error" not in record

    def guarded_all(
        self,
        part: str,
        about: Mapping[str, Any],
        measure: Callable[[], Iterable[Mapping[str, Any]]],
    ) -> None:
        """Adds ``about`` with each record that ``measure`` finds; an error is one of them."""
        try:
            for record in measure():
                self.add(part, {**about, **record})
        except Exception as error:
            traceback.print_exc()
            self.failed += 1
            self.add(part, {**about, "error": f"{type(error).__name__}: {str(error)[:2000]}"})

    def save(self) -> None:
        if self.path is not None:
            self.path.write_text(json.dumps(_finite(self.data), indent=1) + "\n")


_SCALES = {"us": 1e6, "ms": 1e3, "MB": 1e-6, "GB/s": 1e-9, "%": 100.0}


def _cell(value, heading):
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) or heading.split()[-1] in _SCALES:
        value = value * _SCALES.get(heading.split()[-1], 1.0)
        return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def _finite(value):
    """With None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot_shapes(records: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Times over T, one panel for each operation and kind of shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [record for record in records if "error" not in record]
    rows = list(dict.fromkeys(record["name"] for record in records))
    columns = list(dict.fromkeys(record["op"] for record in records))
    figure, panels = pyplot.subplots(
        len(rows), len(columns), figsize=(4 * len(columns), 3.2 * len(rows)), squeeze=False
    )
    for (i, name), (j, op) in ((r, c) for r in enumerate(rows) for c in enumerate(columns)):
        axes = panels[i][j]
        here = [record for record in records if (record["name"], record["op"]) == (name, op)]
        for exchange in dict.fromkeys(record["exchange"] for record in here):
            lines = [("wall_s", exchange, "s--")]
            if exchange == "freeio":
                lines += [("kernel_s", "freeio, kernel", "o-"), ("floor_s", "floor", "k:")]
            for field, label, style in lines:
                points = [
                    (r["num_tokens"], r[field] * 1e6) for r in here if _is(r, exchange, field)
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        axes.set(title=f"{name}: {op}", xlabel="tokens per rank", ylabel="us")
        if axes.lines:
            axes.set(xscale="log", yscale="log")
            axes.legend(fontsize=6)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_scaling(records: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Each operation's time and floor over the number of ranks, one panel for each shape."""
    records = [record for record in records if "error" not in record]

    def panel(axes, shape):
        here = [r for r in records if (r["name"], r["num_tokens"]) == shape]
        for op in dict.fromkeys(record["op"] for record in here):
            mine = [record for record in here if record["op"] == op]
            ranks = [record["num_ranks"] for record in mine]
            (line,) = axes.plot(ranks, [r["kernel_s"] * 1e6 for r in mine], "o-", label=op)
            axes.plot(ranks, [r["floor_s"] * 1e6 for r in mine], ":", color=line.get_color())
        axes.set(
            title=f"{shape[0]}, T={shape[1]} (dotted: floor)",
            xlabel="ranks",
            ylabel="us",
            xticks=sorted({record["num_ranks"] for record in here}),
        )
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=6)

    draw(list(dict.fromkeys((r["name"], r["num_tokens"]) for r in records)), panel, path)


def draw(panels: Sequence[Any], panel: Callable[[Any, Any], None], path: pathlib.Path) -> None:
    """A picture of panels side by side; ``panel(axes, key)`` draws one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    number = max(1, len(panels))
    figure, all_axes = pyplot.subplots(1, number, figsize=(4.5 * number, 3.6), squeeze=False)
    for axes, key in zip(all_axes[0], panels, strict=False):
        panel(axes, key)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_timeline(
    programs: dict[str, list[Event]], path: pathlib.Path, kind_of: Callable[[Event], str]
) -> None:
    """What ran when on the first device: a panel for each program, a row for each of its streams.

    Args:
      programs: events by the program's name.
      path: of the PNG.
      kind_of: an event's kind, which has a color.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, panels = pyplot.subplots(
        len(programs), 1, figsize=(12, 1.6 * len(programs) + 0.6), squeeze=False
    )
    colors: dict[str, str] = {}
    for axes, (name, events) in zip(panels[:, 0], programs.items(), strict=True):
        device = min((event.device for event in events), default="")
        events = [event for event in events if event.device == device]
        begin = min((event.start for event in events), default=0.0)
        streams = sorted({event.stream for event in events})
        for event in events:
            kind = kind_of(event)
            color = colors.setdefault(kind, f"C{len(colors)}")
            span = ((event.start - begin) * 1e3, event.duration * 1e3)
            axes.broken_barh([span], (streams.index(event.stream) - 0.4, 0.8), facecolors=color)
        axes.set(title=name, xlabel="ms", yticks=range(len(streams)), yticklabels=streams)
    patches = [Patch(color=color, label=kind) for kind, color in colors.items()]
    figure.legend(handles=patches, ncols=max(1, len(patches)), loc="upper right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _is(record, exchange, field):
    value = record.get(field)
    return record["exchange"] == exchange and value is not None and math.isfinite(value)
