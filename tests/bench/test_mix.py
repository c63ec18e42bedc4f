"""Random mixes of exchanges on CPU: the steps, the comparison, and that it sees what is wrong."""

from collections import Counter

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


def test_mixes_equal_the_reference():
    report = Report({})
    mix.run(report, 7, num_ranks=2, **SMALL)
    (record,) = report.data["mix"]
    assert (record["rounds"], record["wrong"]) == (7, "nothing")


def test_a_wrong_exchange_is_seen():
    class Wrong(mix.Started):
        @staticmethod
        def done(pending):
            result = pending.done()
            return result.at[0, 0].add(1.0) if hasattr(result, "at") else result

    case = mix.cases(Wrong, 2, **SMALL)[0]
    assert int(mix._count_differing(case.program(*case.args), case.expected)) > 0
