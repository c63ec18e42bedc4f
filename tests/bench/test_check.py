"""The checks find nothing where all is right, and say what is wrong where it is not."""

from types import SimpleNamespace

import jax.numpy as jnp

import freeio_jax as fio
from freeio_jax.bench import check
from freeio_jax.bench.check import CheckShape
from freeio_jax.bench.report import Report

SHAPES = (CheckShape(7, 16, 4, 2, 0.5), CheckShape(9, 8, 3, 4, None, 4, "float32"))


def test_right_exchanges_pass():
    report = Report({})
    for name, shape in zip(("freeio", "dense"), SHAPES, strict=True):
        check.run(report, num_ranks=2, exchanges=[name], shapes=[shape])
    assert report.failed == 0
    assert [record["wrong"] for record in report.data["check"]] == ["nothing"] * 2


def test_a_wrong_exchange_is_found():
    def combine(expert_out, handle, weights):
        z = fio.combine(expert_out, handle, weights)
        return z.at[0, 0].set(jnp.nan)

    def dispatch(*args, **kwargs):
        out = fio.dispatch(*args, **kwargs)
        return fio.Dispatched(out.tokens.at[0, 0].add(1.0), out.group_sizes, out.handle)

    right = {"dispatch": fio.dispatch, "combine": fio.combine}
    names = {}
    for wrong in ({"combine": combine}, {"dispatch": dispatch}):
        api = _Hashable(**right | wrong)
        names[next(iter(wrong))] = check.compare(api, SHAPES[1], 2, "uniform", 0)
    assert names["combine"]["z"] == 2  # one on each rank
    assert "tokens" not in names["combine"]
    assert names["dispatch"]["tokens"] == 2
    assert "group_sizes" not in names["dispatch"]


class _Hashable(SimpleNamespace):
    __hash__ = object.__hash__


def test_soak():
    report = Report({})
    check.soak(report, 5, num_ranks=2, shapes=SHAPES[1:])
    (record,) = report.data["soak"]
    assert (record["calls"], record["wrong"]) == (5, "nothing")
    assert record["host_before"] > 0
    assert record["host_after"] < record["host_before"] + (64 << 20)
