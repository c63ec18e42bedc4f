"""The same tokens on more and more ranks."""

import math

import jax
import pytest

from freeio_jax.bench import __main__ as command
from freeio_jax.bench import command_line, scaling
from freeio_jax.bench.floor import Limits
from freeio_jax.bench.report import Report, plot_scaling
from freeio_jax.bench.shapes import Kernel, Suite


def test_numbers_of_ranks():
    assert scaling.numbers_of_ranks(8) == (2, 4, 8)
    assert scaling.numbers_of_ranks(6) == (2, 4, 6)
    assert scaling.numbers_of_ranks(2) == (2,)
    assert scaling.numbers_of_ranks(1) == (1,)


def test_each_number_has_its_own_limits(monkeypatch):
    def limits(devices):
        return Limits(*2 * [len(devices) * 1e6], *2 * [1e12], trip=0.0)

    monkeypatch.setattr(Limits, "measure", limits)
    monkeypatch.setattr(scaling, "time_kernel_or_wall", lambda program, op: Kernel(2.0, False))
    report = Report({})
    suite = Suite("tiny", 8, 2, 8, "uniform", (6,))
    devices = jax.devices()[:4]
    scaling.run(report, [suite], devices=devices, ops=["dispatch", "combine"], dtype="float32")
    records = report.data["scaling"]
    assert [(r["num_ranks"], r["op"]) for r in records] == [
        (r, op) for r in (2, 4) for op in ("dispatch", "combine")
    ]
    for record in records:
        rate = record["num_ranks"] * 1e6
        assert record["floor_s"] == pytest.approx(record["link_bytes"] / rate)
        assert record["ratio"] == pytest.approx(2.0 / record["floor_s"])
        assert record["of_link"] == pytest.approx(1 / record["ratio"])
    assert report.data["about"]["limits_of_ranks"]["4"]["pull"] == 4e6


def test_experts_that_cannot_be_shared_out_are_left_out(capsys):
    report = Report({})
    suite = Suite("tiny", 8, 2, 8, "uniform", (6,))
    devices = jax.devices()[:3]
    scaling.run(report, [suite], devices=devices, ops=["combine"], dtype="float32")
    assert [record["num_ranks"] for record in report.data["scaling"]] == [2]
    assert "tiny: 8 experts are not 3 equal parts" in capsys.readouterr().out


def test_part_and_plot(tmp_path, capsys):
    """On CPU: wall times, and no limits."""
    sizes = ["--hidden", "8", "--top-k", "2", "--num-experts", "4", "--tokens", "4", "--ranks", "2"]
    path = tmp_path / "out.png"
    arguments = [*sizes, "--scaling", "--ops", "combine", "--png", str(path)]
    assert command.run_parts(command_line.parse_arguments(arguments)) == 0
    assert path.stat().st_size > 1000
    assert "| custom | 4 | combine | 2 |" in capsys.readouterr().out


def test_plot_without_what_failed(tmp_path):
    record = {"name": "a", "num_tokens": 1, "op": "dispatch", "num_ranks": 2}
    good = {**record, "kernel_s": 2e-6, "floor_s": math.nan}
    plot_scaling([good, {**record, "error": "x"}], tmp_path / "one.png")
    plot_scaling([], tmp_path / "none.png")
    assert all((tmp_path / name).exists() for name in ("one.png", "none.png"))
