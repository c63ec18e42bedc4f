"""The floor beside one with a single rate."""

import pytest

from freeio_jax.bench import floors
from freeio_jax.bench.floor import Limits
from freeio_jax.bench.report import Report
from freeio_jax.bench.shapes import Kernel, Suite

SUITE = Suite("tiny", 16, 2, 4, "uniform", (6,))
LIMITS = Limits(push=1e6, pull=8e5, memory=1e12, write=1e12, trip=0.0)


@pytest.mark.parametrize(
    ("is_small", "way", "apart"), [(False, "loads", 0.25), (True, "stores", 0.0)]
)
def test_loads_have_a_rate_of_their_own(monkeypatch, capsys, is_small, way, apart):
    monkeypatch.setattr(floors, "time_kernel", lambda program, op: Kernel(1e-6, is_small))
    report = Report({})
    options = {"num_ranks": 2, "ops": ["dispatch", "combine"], "dtype": "float32"}
    floors.run(report, LIMITS, [SUITE], **options)
    dispatch, combine = report.data["floors"]
    assert (dispatch["way"], combine["way"]) == (way, "stores")
    assert dispatch["apart"] == pytest.approx(apart)
    assert combine["apart"] == 0
    assert f"apart by at most {apart:.1%}" in capsys.readouterr().out
