"""The experts' product: which implementations are timed, and against what."""

from freeio_jax.bench import experts
from freeio_jax.bench.report import Report
from freeio_jax.grouped_matmul import Product

EVEN = experts.Shape(256, 128, 128, 4, "even")
UNEVEN = experts.Shape(250, 128, 128, 4, "random")


def run(**options):
    report = Report({})
    experts.run(report, [EVEN, UNEVEN], dtype="float32", **options)
    assert report.failed == 0
    return report.data["experts"]


def test_all_are_right_and_equal_groups_also_go_in_one_call():
    records = run()
    for shape, names in (
        (EVEN, {"batched", "tiled", "ragged_dot"}),
        (UNEVEN, {"tiled", "ragged_dot"}),
    ):
        for product in Product:
            here = [
                r for r in records if r["shape"] == str(shape) and r["product"] == product.value
            ]
            assert {r["by"] for r in here} == names
            assert {r["verdict"] for r in here} == {"right"}
            operations = 2 * shape.num_rows * shape.k * shape.n
            for record in here:
                assert record["tflops"] == operations / record["seconds"] * 1e-12
                assert record["of_dense"] == record["dense_seconds"] / record["seconds"]


def test_each_takes_turns_with_the_dense_product_alone(monkeypatch):
    """Each is the first one in every second pair. The first pair does not count."""
    order, clock = [], [0.0]

    def program(name, seconds):
        def run():
            order.append(name)
            # The first pair, after a run to warm up and one that is counted: slow.
            clock[0] += seconds * (100 if len(order) <= 6 else 1)

        return run

    monkeypatch.setattr(experts, "TURN", 0.0)
    monkeypatch.setattr(experts.time, "perf_counter", lambda: clock[0])
    assert experts._seconds(program("dense", 1.0), program("own", 2.0)) == (1.0, 2.0)
    turns = order[4:]
    pairs = [tuple(turns[i : i + 2]) for i in range(0, len(turns), 2)]
    assert pairs == [("dense", "own"), ("own", "dense")] * (experts.TURNS // 2) + [("dense", "own")]


def test_some_implementations_alone():
    assert {r["by"] for r in run(products=["tiled"])} == {"batched", "tiled"}
