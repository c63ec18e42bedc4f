"""Many layers in one program: what is timed, and by how many processes."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from freeio_jax.bench import decode
from freeio_jax.bench.cases import expert_mesh
from freeio_jax.bench.profile import Event
from freeio_jax.bench.report import Report
from freeio_jax.bench.shapes import Case, Suite

SUITE = Suite("custom", 16, 2, 8, "uniform", (1, 3))


def test_layers_give_the_tokens_back():
    """With weights that add up to one and experts that do nothing."""
    case = Case(SUITE, 3, 4, "float32")
    program, args = decode._exchange(case, mesh=expert_mesh(4), layers=5)
    tokens = np.asarray(args[0])
    text = program.lower(*args).compile().as_text()
    assert text.count('custom_call_target="freeio_dispatch"') == 5
    assert text.count('custom_call_target="freeio_combine"') == 5
    np.testing.assert_allclose(program(*args), tokens, 1e-5, 1e-6)
    assert args[0].is_deleted()  # donated


def test_a_shared_expert_beside_the_combine_computes_what_it_does_after_it():
    case, results = Case(SUITE, 3, 4, "float32"), []
    for beside in decode.SHARED.values():
        program, args = decode._with_shared_expert(
            case, beside, mesh=expert_mesh(4), layers=3, width=4
        )
        started = "freeio_start" in str(program.trace(*args).jaxpr)
        assert started == beside
        results.append(np.asarray(program(*args)))
    np.testing.assert_allclose(*results, 1e-5, 1e-6)


def test_products_are_not_merged():
    program, args = decode._products(mesh=expert_mesh(2), layers=3)
    jaxpr = str(program.trace(*args).jaxpr)
    np.testing.assert_allclose(program(*args), args[1], 1e-5)
    assert jaxpr.count("dot_general") == 6
    assert jaxpr.count("optimization_barrier") == 3


def test_report(capsys):
    report = Report({})
    decode.run(report, SUITE, num_ranks=2, dtype="float32", layers=2)
    assert report.failed == 0
    records = report.data["decode"]
    assert [(r["program"], r["num_tokens"], r["command_buffers"]) for r in records] == [
        (program, tokens, buffers)
        for program, tokens in (
            *((name, tokens) for tokens in (1, 3) for name in ("exchange", *decode.SHARED)),
            ("two small products", 1),
        )
        for buffers in ("off", "on", "in sequence")
    ]
    for record in records:
        assert record["wall_s"] >= record["host_s"] > 0
        assert record["in_a_row_s"] > 0
        assert math.isfinite(record["host_of_call_s"]) == (record["program"] not in decode.SHARED)
        assert math.isnan(record["span_s"])  # no GPU
    assert "Decode: 2 layers, 1 process(es)" in capsys.readouterr().out


def test_figures_of_the_host_are_of_one_layer_and_one_call(monkeypatch):
    seconds = {61: (122.0, 73.2), 1: (5.0, 1.2)}  # until the result is there; until Python is back
    monkeypatch.setattr(decode, "_seconds", lambda loop: seconds[loop])
    monkeypatch.setattr(decode, "_seconds_in_a_row", lambda loop: {61: 61.0}[loop])
    monkeypatch.setattr(decode.profile, "record", lambda loop: [])
    record = decode._measure(61, 1, 61)
    assert (record["wall_s"], record["host_s"]) == (2.0, pytest.approx(1.2))
    assert record["in_a_row_s"] == 1.0
    assert record["host_of_call_s"] == pytest.approx((73.2 - 1.2) / 60 / 2)
    assert math.isnan(record["span_s"])


def test_figures_of_devices_are_of_one_layer():
    events = [
        Event(device, name, start, 1.0)
        for device in ("gpu0", "gpu1")
        for name, start in (
            ("Memset 0", -5.0),
            ("dispatch_small_kernel", 0.0),
            ("combine_small_kernel", 2.0),
            ("dispatch_small_kernel", 4.0),
            ("combine_small_kernel", 7.0),
        )
    ]
    assert decode._on_devices(events, 2) == {
        "span_s": 4.0,
        "kernels_s": 2.0,
        "dispatch_s": 1.0,
        "combine_s": 1.0,
    }
    assert decode._on_devices([], 2) == {}


@pytest.mark.timeout(170)
def test_processes_print_once(tmp_path):
    """In several processes, by the launcher."""
    sizes = ["--tokens", "2", "--hidden", "16", "--top-k", "2", "--num-experts", "4"]
    path = tmp_path / "decode.json"
    command = ["-m", "freeio_jax.bench", "--decode", "--layers", "3", *sizes, "--json", str(path)]
    launched = subprocess.run(
        [sys.executable, "-m", "freeio_jax.launch", "-n", "2", *command],
        capture_output=True,
        text=True,
        timeout=160,
    )
    assert launched.returncode == 0, launched.stdout + launched.stderr
    rows = [line for line in launched.stdout.splitlines() if "| exchange | 2 | off |" in line]
    assert len(rows) == 1, launched.stdout
    data = json.loads(path.read_text())
    assert data["about"]["ranks"] == 2
    assert {record["processes"] for record in data["decode"]} == {2}
