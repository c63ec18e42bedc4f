"""Parts of a kernel's time, from its CTAs' timelines."""

from types import SimpleNamespace

import pytest

from freeio_jax.bench import stamps

PHASES = ["opening", "routing", "agreeing", "moving", "finishing"]


def test_parts_add_up_to_the_span():
    timelines = [
        # The first CTA waits for the peers at the end, from 900 on.
        (100, 1000, [10, 90, 200, 500, 100]),
        # The second one begins later, and ends its own work last, at 940.
        (120, 940, [20, 100, 100, 600, 0]),
    ]
    parts = stamps.parts(PHASES, timelines)
    assert stamps.span(timelines) == pytest.approx(900e-9)
    assert parts == pytest.approx(
        {
            "agreement_s": (150 + 60) * 1e-9,  # from 940 to 1000 all wait for the peers
            "routing_s": 95e-9,
            "transfer_s": 550e-9,
            "rest_s": (900 - 210 - 95 - 550) * 1e-9,
        }
    )


def test_the_step_of_the_clock():
    timelines = [(1000, 3048, [0] * 5), (1032, 3080, [0] * 5), (1000, 3048, [0] * 5)]
    assert stamps.step(timelines) == pytest.approx(32e-9)
    assert stamps.step([(5, 5, [0] * 5)]) == 0


def test_a_shipped_build_has_none():
    assert not stamps.are_there(SimpleNamespace())
    assert not stamps.are_there(SimpleNamespace(cuda=SimpleNamespace()))
    assert stamps.are_there(SimpleNamespace(cuda=SimpleNamespace(take_timelines=None)))
