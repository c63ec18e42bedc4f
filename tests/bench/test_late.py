"""What counts is the kernel of the rank that comes last."""

import math

import pytest

from freeio_jax.bench import late
from freeio_jax.bench.profile import Event
from freeio_jax.bench.report import Report
from freeio_jax.bench.shapes import Suite

SUITE = Suite("tiny", 8, 2, 8, "uniform", (6,))


@pytest.fixture
def queued(monkeypatch):
    """The delays that were asked for, without the work."""
    delays = []
    monkeypatch.setattr(late, "_delay", lambda device: delays.append)
    return delays


def run(report):
    late.run(
        report,
        [SUITE],
        num_ranks=2,
        ops=["dispatch", "combine"],
        dtype="float32",
        milliseconds=(0.0, 2.5),
    )
    return report.data["late"]


def test_the_last_rank_counts(monkeypatch, queued):
    def record(program, ahead):
        program()
        ahead()
        started = 5.0 + queued[-1]
        return [
            Event("/device:GPU:1", "a::combine_large_kernel<x>", started, 2e-6),
            Event("/device:GPU:0", "a::combine_large_kernel<x>", 5.0, 9e-6),
            Event("/device:GPU:0", "other", 99.0, 1.0),
        ]

    monkeypatch.setattr(late.profile, "record", record)
    report = Report({})
    dispatch, combine = run(report)
    assert report.failed == 0
    assert queued == 2 * (5 * [0.0] + 5 * [2.5])
    assert combine["late_2500us_s"] == 2e-6
    assert math.isnan(dispatch["late_0us_s"])  # no such kernel


def test_without_a_profile(queued, capsys):
    for record in run(Report({})):
        assert math.isnan(record["late_0us_s"])
    assert "2.5 ms late: us" in capsys.readouterr().out
