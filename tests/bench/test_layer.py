"""The MoE layer gives equal results and gradients over every exchange."""

import emulation
import jax
import numpy as np
import pytest

from freeio_jax import reference
from freeio_jax.bench import layer
from freeio_jax.bench.baselines import Dense, Ragged
from freeio_jax.bench.report import Report

pytestmark = pytest.mark.usefixtures("few_calls")

SIZES = layer.Sizes(2, 12, hidden=8, top_k=2, num_experts=4, expert_width=6, dtype="float32")
EXCHANGES = {
    "reference": reference,
    "ragged": Ragged(3),
    "by expert": Ragged(3, by_expert=True),
    "dense": Dense(slots_factor=2.0),
}


@pytest.fixture(scope="module")
def tiny():
    return layer.Layer(SIZES, room=1.0)  # some are dropped: of all exchanges the same


@pytest.fixture(scope="module")
def expected(tiny):
    return tiny.backward(None).compile()()


@pytest.mark.parametrize("name", EXCHANGES)
def test_gradients_are_equal(name, tiny, expected, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulation.ragged_all_to_all)
    got = tiny.backward(EXCHANGES[name]).compile()()
    assert int(expected[0][1].dropped) > 0
    jax.tree.map(
        lambda g, e: np.testing.assert_allclose(np.asarray(g), np.asarray(e), 1e-4, 1e-6),
        got,
        expected,
    )


def test_report(capsys):
    report = Report({})
    layer.run(report, [SIZES], ["freeio"])
    assert report.failed == 0
    forward, backward = report.data["layer"]
    assert (forward["pass"], backward["pass"]) == ("forward", "forward + backward")
    for record in (forward, backward):
        assert record["tokens_per_s"] == 24 / record["wall_s"]
        assert record["alone_share"] == record["alone_s"] / record["wall_s"]
        assert record["kernels_s"] == {}  # no GPU
    assert "| 12 | forward | freeio |" in capsys.readouterr().out
