"""Random mixes of exchanges on CPU: the steps, the comparison, and that it sees what is wrong."""

from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest

from freeio_jax.bench import mix
from freeio_jax.bench.report import Report

SMALL = {"sizes": ((5, 8),), "programs": 2, "inputs": 2}


@pytest.mark.parametrize("seed", range(20))
def test_each_exchange_is_dispatched_and_combined_and_waited_for_twice(seed):
    counts = Counter(mix.draw_steps(seed))
    items = [item for what, item in counts if what == "dispatch"]
    for item in items:
        assert counts["dispatch", item] == counts["combine", item] == 1
        assert counts["done", item] == 2
    assert sum(counts[step] for step in counts if step[0] not in mix.WORK) == 4 * len(items)


def test_programs_differ_and_have_all_kinds_of_steps():
    programs = [mix.draw_steps(seed) for seed in range(mix.PROGRAMS)]
    assert len(set(programs)) == mix.PROGRAMS
    kinds = {what for steps in programs for what, _ in steps}
    assert kinds == {"dispatch", "combine", "done", *mix.WORK}


def test_mixes_are_right(capsys):
    report = Report({})
    mix.run(report, 200, num_ranks=2, **SMALL)
    (record,) = report.data["mix"]
    assert (record["rounds"], record["wrong"]) == (200, "nothing")
    assert "# 200 mixes" in capsys.readouterr().out


def test_nothing_is_rounded():
    """Of the sizes that run on GPUs, where sums have another order."""
    for num_tokens, hidden in mix.SIZES:
        shape = mix.Shape(4, num_tokens, hidden, 4, 32)
        args = mix._input(shape, 0)
        for seed in range(mix.PROGRAMS):
            results, (by_tokens, by_weights) = mix.right(mix.draw_steps(seed), shape, *args)
            for array in (*results, by_tokens, by_weights):
                # Multiples of 2**-6, with room in float32 for sums that are larger than the result.
                assert np.all(array * 64 == np.round(array * 64))
                assert np.abs(array).max() < 2**16


@pytest.mark.parametrize("operation", ["combine", "combine_start", "dispatch_start"])
def test_a_wrong_exchange_is_seen(operation, monkeypatch):
    exchange = getattr(mix.fio, operation)

    def of_other_rows(rows, *args, **options):
        return exchange(jnp.roll(rows, 1, axis=0), *args, **options)

    monkeypatch.setattr(mix.fio, operation, of_other_rows)
    counts = [int(case().addressable_data(0)[0]) for case in mix.cases(2, **SMALL)]
    assert max(counts) > 0
