"""Wall times: how often what runs, and that the figure is of one run."""

import pytest

from freeio_jax.bench import timing


@pytest.mark.parametrize(
    ("seconds", "runs", "samples"), [(0.015625, 7, 7), (0.001, 20, 7), (0.25, 1, 3)]
)
def test_seconds_per_run(seconds, runs, samples, monkeypatch):
    now, count = 0.0, 0

    def run():
        nonlocal now, count
        now += seconds
        count += 1

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    assert timing.seconds_per_run(run, least=0.1) == pytest.approx(seconds)
    # One to warm up, and one to see how long a run takes.
    assert count == 2 + samples * runs


def test_compare_runs_all_in_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    assert set(timing.compare(calls, repeats=2)) == {"a", "b"}
    assert order == ["a", "b"] * 3
