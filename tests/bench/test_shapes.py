"""The programs that are timed compute what they should, and nothing of it is merged or left out."""

import emulation
import jax
import numpy as np
import pytest
from helpers import assert_bitwise

import freeio_jax as fio
from freeio_jax.bench import shapes
from freeio_jax.bench.baselines import NAMES, Dense, named
from freeio_jax.bench.cases import loads
from freeio_jax.bench.floor import KERNELS, Limits
from freeio_jax.bench.programs import Program
from freeio_jax.bench.report import Report

SUITE = shapes.Suite("tiny", 8, 2, 8, "half", (6,))
LIMITS = Limits(push=1e9, pull=9e8, memory=1e10, write=1e10, trip=1e-6)

pytestmark = pytest.mark.usefixtures("few_calls")


@pytest.fixture(scope="module")
def case():
    return shapes.Case(SUITE, 6, 4, "float32")


def test_nothing_is_dropped(case):
    pairs = loads(case.topk_idx, case.shape)
    assert pairs.sum(0).max() == 24
    assert case.capacity == 24  # 1.25 times the mean would be 15
    assert case.slots == 6  # on average 3
    assert case.exchange("dense") == Dense(slots=6)
    even = shapes.Case(shapes.SUITES["large"], 128, 4, "bfloat16")
    assert even.capacity == 1280


def test_programs(case):
    programs = case.programs()
    outs = {}
    for op in KERNELS:
        program = programs.build(fio, op, 3)
        assert program.found >= program.calls == 3
        outs[op] = program()
        for out in outs[op]:
            jax.tree.map(assert_bitwise, out, outs[op][0])
    dispatched = outs["dispatch"][0]
    weights, tokens = np.asarray(programs.weights), np.asarray(programs.tokens)
    assert int(dispatched.handle.num_dropped.sum()) == 0
    # Without experts a token comes back times the sum of its weights.
    z = np.asarray(outs["combine"][0])
    np.testing.assert_allclose(z, tokens * weights.sum(-1, keepdims=True), rtol=1e-5)
    by_rows, by_weights = outs["combine_transpose"][0]
    square = np.sum(tokens**2, axis=-1, keepdims=True)
    np.testing.assert_allclose(by_weights, np.broadcast_to(square, weights.shape), rtol=1e-5)
    assert_bitwise(outs["dispatch_along"][0][0], dispatched.tokens)
    assert by_rows.shape == dispatched.tokens.shape


def test_merged_calls_are_noticed():
    class Compiled:
        def as_text(self):
            return "x = f32[] all-to-all-start(y)\n z = all-to-all-done(x)"

    assert Program(Compiled(), (), 2).found == 1


def test_table(capsys, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulation.ragged_all_to_all)
    monkeypatch.setattr(shapes, "time_kernel", lambda program, op: shapes.Kernel(5e-6, False))
    report = Report({})
    exchanges = ["freeio", "ragged", "dense"]
    options = {"num_ranks": 2, "ops": ["dispatch", "combine_transpose"], "dtype": "float32"}
    shapes.run(report, LIMITS, [SUITE], exchanges=exchanges, **options)
    assert report.failed == 0
    records = {(r["exchange"], r["op"]): r for r in report.data["shapes"]}
    # Of others dispatch and combine alone.
    assert set(records) == {
        ("freeio", "dispatch"),
        ("freeio", "combine_transpose"),
        ("ragged", "dispatch"),
        ("dense", "dispatch"),
    }
    ours = records["freeio", "dispatch"]
    assert ours["ratio"] == 5e-6 / ours["floor_s"]
    assert ours["link_rate"] == ours["link_bytes"] / 5e-6
    assert ours["hbm_bytes"] > ours["link_bytes"] > 0
    assert (ours["num_tokens"], ours["routing"], ours["merged"]) == (6, "half", False)
    dense = records["dense", "dispatch"]
    assert dense["of_freeio"] == dense["wall_s"] / ours["wall_s"]
    assert not dense["merged"]
    assert "| tiny | 6 | dispatch | dense |" in capsys.readouterr().out


def test_what_does_not_compile_is_reported_and_the_rest_timed(capsys):
    report = Report({})
    options = {"num_ranks": 2, "ops": ["dispatch"], "dtype": "float32"}
    shapes.run(report, LIMITS, [SUITE], exchanges=["ragged", "freeio"], **options)
    ragged, ours = report.data["shapes"]
    assert report.failed == 1
    assert "agged" in ragged["error"]  # XLA has no such collective for CPU
    assert ours["wall_s"] > 0


def test_sweep(monkeypatch):
    """The least number of SMs within 95% of the best; the setting is as before afterwards."""
    speed = {4: 1.0, 8: 1.95, 16: 2.0}
    monkeypatch.setattr(
        shapes,
        "time_kernel",
        lambda program, op: shapes.Kernel(1 / speed[fio.config()["num_sms"]], False),
    )
    report = Report({})
    options = {"num_ranks": 2, "ops": ["dispatch"], "dtype": "float32"}
    shapes.sweep(report, LIMITS, [SUITE], sms=(4, 8, 16), **options)
    (record,) = report.data["sms"]
    assert record["enough_sms"] == 8
    assert record["sms_4"] == 1.0
    assert np.isnan(record["ratio_4"])  # no figures of this device's multiprocessors
    assert fio.config()["num_sms"] is None


def test_once(case, capsys):
    shapes.once("dispatch_along", case)
    said = capsys.readouterr().out
    moved = case.traffic()["dispatch_along"]
    assert "dispatch_along_kernel: 1 launch before" in said
    assert f"link_bytes {moved.link_bytes}, hbm_bytes {moved.hbm_bytes}" in said


def test_all_names_are_exchanges():
    for name in NAMES:
        assert callable(named(name).dispatch)
        assert callable(named(name).combine)
