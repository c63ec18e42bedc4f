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
        (EVEN, {"dense", "batched", "tiled", "ragged_dot"}),
        (UNEVEN, {"dense", "tiled", "ragged_dot"}),
    ):
        for product in Product:
            here = [
                r for r in records if r["shape"] == str(shape) and r["product"] == product.value
            ]
            assert {r["by"] for r in here} == names
            assert {r["verdict"] for r in here if r["by"] != "dense"} == {"right"}
            (dense,) = (r for r in here if r["by"] == "dense")
            assert dense["of_dense"] == 1
            operations = 2 * shape.num_rows * shape.k * shape.n
            assert dense["tflops"] == operations / dense["seconds"] * 1e-12


def test_some_implementations_alone():
    assert {r["by"] for r in run(products=["tiled"])} == {"dense", "batched", "tiled"}
