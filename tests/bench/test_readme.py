"""The figures of README and of pages in docs are those of records that are checked in."""

import inspect
import json
import pathlib

import jax
import pytest

from freeio_jax.bench import __main__ as command
from freeio_jax.bench import command_line, decode, experts, layer, readme, shapes, tax
from freeio_jax.bench.report import Report

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("performance.md", "overlap.md"))]
TABLES = [
    pytest.param(*found, id=f"{page.name}-{found[0]}")
    for page in PAGES
    for found in readme.records_in(page.read_text())
]


@pytest.mark.parametrize(("table", "name", "lines"), TABLES)
def test_tables_are_what_their_records_say(table, name, lines):
    data = json.loads((ROOT / "docs" / "notebook" / name).read_text())
    expected = readme.render(table, data)
    assert len(expected) > 2, f"{name} has no figures for the table {table}"
    # If this fails: python -m freeio_jax.bench --readme prints the tables of its record.
    assert lines == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_figure_is_outside_of_these_tables(page):
    assert readme.records_in(page.read_text())
    assert readme.figures_outside_tables(page.read_text()) == []


def test_figures_outside_of_tables_are_found():
    text = """Takes 12.5 us, at 1,200 GB/s.

    not 3 us, which is in a command

`4 ms` is code.

<!-- figures: cpu of some.json -->
| T |
|---|
| 8 ms |

| T | us |
|---|---|
| 1 | 9 us |
"""
    assert readme.figures_outside_tables(text) == ["12.5 us", "1,200 GB/s", "9 us"]
    assert readme.records_in(text) == [("cpu", "some.json", ["| T |", "|---|", "| 8 ms |"])]


def test_a_record_has_a_date_a_commit_and_versions():
    for page in PAGES:
        for _, name, _ in readme.records_in(page.read_text()):
            about = json.loads((ROOT / "docs" / "notebook" / name).read_text())["about"]
            assert {"device", "jax", "ranks"} <= about.keys(), name
            assert "by_hand" not in about or {"date", "commands"} <= about.keys(), name


def record(exchange, op, **fields):
    return {"name": "large", "num_tokens": 128, "exchange": exchange, "op": op, **fields}


DATA = {
    "about": {"limits": {"push": 3.65e11, "pull": None, "memory": 4e12, "link": 1, "trip": 1e-6}},
    "shapes": [
        record("freeio", "dispatch", kernel_s=1.38e-5, floor_s=7.7e-6, ratio=1.8, wall_s=6e-5),
        record("freeio", "combine", kernel_s=1.34e-5, floor_s=7.5e-6, ratio=1.78, wall_s=5e-5),
        *(
            record(name, op, wall_s=seconds)
            for name, seconds in (("dense", 1.5e-4), ("ragged", 2e-4), ("ragged-by-expert", 1e-4))
            for op in ("dispatch", "combine")
        ),
    ],
}


def test_tables():
    assert readme.render("readme", DATA)[2:] == [
        "| 128 | 13.8 us | 13.4 us | 7.7 us | 110 us | 200 us (ragged-by-expert) |"
    ]
    assert readme.render("operations", DATA)[2:] == [
        "| large | 128 | 7.7 | 13.8 (1.80) | 13.4 (1.78) |  |  |"
    ]
    assert readme.render("xla", DATA)[2:] == ["| 128 | 110 | 200 | 400 | 300 | 0.55 |"]
    assert readme.render("limits", DATA)[2:] == ["| 365 |  | 4000 | 1.00 |"]
    assert readme.render("decode", DATA)[2:] == []


def test_the_fastest_of_xla_may_be_a_new_one_that_ran_in_one_process():
    def newest(processes, seconds, **more):
        about = {"exchange": "ragged-1", "options": "device kernel", "processes": processes}
        about |= {"name": "large", "num_tokens": 128, "wall_s": seconds}
        return [{**about, "op": op, **more} for op in ("dispatch", "combine")]

    crashed = {"exchange": "ragged", "options": "device kernel", "processes": 1, "ended": "SIGSEGV"}
    both = {**DATA, "newest": [*newest(1, 9e-5), *newest(2, 1e-5), crashed]}
    assert readme._fastest_of_xla(both, 128) == (pytest.approx(1.8e-4), "ragged-1, device kernel")
    for other in (newest(1, None), newest(1, 9e-5, name="custom")):
        assert readme._fastest_of_xla({**DATA, "newest": other}, 128)[1] == "ragged-by-expert"


def test_memory_of_chunks():
    about = {"model": "some", "num_tokens": 8, "pass": "forward"}
    records = [about | {"num_chunks": n, "temporary_bytes": 6.4e7 / n} for n in (1, 4)]
    records.append({"model": "other", "num_tokens": 8, "error": "RuntimeError: no plugin"})
    assert readme.render("memory", {"memory": records})[2:] == [
        "| some | 8 | forward | 64 |  | 16 |"
    ]


def test_a_product_that_could_not_be_measured_is_a_cell():
    def of(product, **found):
        return {"shape": "8192 x 2 x 2, 2 even", "product": product, "num_rows": 8192, **found}

    def right(by, share):
        return {"by": by, "verdict": "right", "of_dense": share}

    records = [
        of("forward", **right("hopper", 0.9)),
        of("forward", **right("tokamax 0.1", 0.4)),
        of("rows_gradient", error="XlaRuntimeError: out of memory"),
        of("weights_gradient", **right("hopper", 0.8)),
        of("weights_gradient", by="tokamax 0.1", verdict="WRONG by 1"),
    ]
    assert readme.render("experts", {"experts": records})[2:] == [
        "| 8192 x 2 x 2, 2 even | 0.90 | failed | 0.80 | 0.40 / failed / wrong |"
    ]


def test_what_is_measured_is_what_the_tables_show():
    assert set(readme.TOKENS) <= set(shapes.SUITES)
    assert set(readme.README_TOKENS) <= set(readme.TOKENS["large"])


def test_a_record_on_cpu(tmp_path, capsys, monkeypatch):
    path = tmp_path / "record.json"
    sizes = ["--tokens", "4", "--hidden", "8", "--top-k", "2", "--num-experts", "8", "--ranks", "2"]
    arguments = ["--readme", "--repeats", "1", *sizes, "--json", str(path)]
    assert command.run_parts(command_line.parse_arguments(arguments)) == 0
    data = json.loads(path.read_text())
    assert {"date", "commit", "command", "jax", "device", "platform"} <= data["about"].keys()
    assert len(data["cpu"]) == 3
    said = capsys.readouterr().out
    assert "\n".join([readme.marker("cpu", "record.json"), *readme.render("cpu", data)]) in said


def test_a_record_needs_a_place(capsys):
    with pytest.raises(SystemExit):
        command_line.parse_arguments(["--readme"])
    assert "--readme makes a record" in capsys.readouterr().err


def test_all_parts_of_a_record_are_called_as_they_want(monkeypatch):
    """They need GPUs, and hours on CPU: here only their arguments are looked at."""
    called = []

    def note(module):
        signature = inspect.signature(module.run)

        def run(*args, **kwargs):
            signature.bind(*args, **kwargs)
            called.append(module.__name__.rpartition(".")[2])

        return run

    for module in (shapes, decode, tax, experts, layer):
        monkeypatch.setattr(module, "run", note(module))
    report = Report({})
    readme.measure(report, devices=jax.devices()[:2], dtype="bfloat16")
    assert called == ["shapes", "shapes", "decode", "tax", "experts", "layer"]
    assert set(report.data["about"]["limits"]) == {"push", "pull", "memory", "write", "trip"}
