"""The collective tax: what a total divides into, and how XLA's kernels are told apart."""

import json
import math
from types import SimpleNamespace

import jax
import pytest

import freeio_jax as fio
from freeio_jax.bench import tax
from freeio_jax.bench.profile import Event
from freeio_jax.bench.report import Report
from freeio_jax.bench.shapes import Case, Suite

pytestmark = pytest.mark.usefixtures("few_calls")

SUITE = Suite("tiny", 16, 2, 4, "uniform", (6,))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "agreement"),
        ("void xla::gpu::MultiGpuBarrierKernel()", "agreement"),
        ("MemcpyD2H", "agreement"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "transfer"),
        ("void xla::gpu::RaggedAllToAllKernel<128>()", "transfer"),
        ("MemcpyP2P", "transfer"),
        ("loop_gather_fusion_3", "shuffling"),
        ("wrapped_broadcast", "shuffling"),
        ("MemcpyD2D", "shuffling"),
        ("loop_broadcast_fusion", "routing"),
        ("void cub::DeviceRadixSortOnesweepKernel<x>", "routing"),
    ],
)
def test_parts_of_xlas_kernels(name, part):
    assert tax.part_of(name, frozenset({"loop_gather_fusion_3", "wrapped_broadcast"})) == part


def test_row_kernels_are_those_whose_results_are_rows():
    text = """
ENTRY %main {
  %loop_gather_fusion.3 = bf16[40,16]{1,0} fusion(%a, %b), kind=kLoop
  %sort.1 = s32[80]{0} sort(%c), dimensions={0}
  ROOT %input_reduce_fusion = (f32[6,16]{1,0}, s32[4]{0}) fusion(%d), kind=kInput
}
"""
    assert tax.row_kernels(text, 6 * 16) == {"loop_gather_fusion_3", "input_reduce_fusion"}


def test_parts_add_up_to_the_span_and_overlaps_count_once():
    events = [
        Event("gpu0", "sort", 0.0, 1.0),
        Event("gpu0", "ncclDevKernel_AllGather", 1.0, 1.0),
        Event("gpu0", "rows", 3.0, 2.0),
        Event("gpu0", "ncclDevKernel_SendRecv", 4.0, 4.0),
    ]
    parts = tax.parts_of_events(events, frozenset({"rows"}))
    assert parts == {
        "agreement_s": 1.0,
        "routing_s": 1.0,
        "shuffling_s": 1.0,
        "transfer_s": 4.0,
        "rest_s": 1.0,
    }
    assert tax.parts_of_events([], frozenset()) == {}


def test_the_arrival_of_peers_is_agreement():
    name = "ncclDevKernel_SendRecv"
    events = [
        Event("gpu0", name, 0.0, 5.0),
        Event("gpu1", name, 3.0, 2.0),  # comes three seconds later
        Event("gpu0", name, 6.0, 2.0),
        Event("gpu1", name, 6.0, 2.0),
    ]
    parts = tax.parts_of_events(events, frozenset())
    assert parts["agreement_s"] == pytest.approx(3.0 / 2)
    assert parts["transfer_s"] == pytest.approx(4.0)
    # Without its partner nobody knows when it came.
    alone = tax.parts_of_events([*events, Event("gpu1", name, 9.0, 1.0)], frozenset())
    assert alone["agreement_s"] == 0


def test_on_cpu_there_are_totals(tmp_path, capsys):
    report = Report({})

    tax.run(
        report,
        [SUITE],
        devices=jax.devices()[:4],
        numbers_of_ranks=(2, 4),
        exchanges=["freeio", "dense"],
        dtype="float32",
        png=tmp_path / "tax.png",
    )
    assert report.failed == 0
    records = report.data["tax"]
    assert [(r["num_ranks"], r["exchange"], r["op"]) for r in records] == [
        (ranks, exchange, op)
        for ranks in (2, 4)
        for exchange in ("freeio", "dense")
        for op in ("dispatch", "combine")
    ]
    for record in records:
        assert record["total_s"] == record["wall_s"] > 0
        assert math.isnan(record["of_ideal"])
    for name in ("tax-latency.png", "tax-parts.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "Collective tax, R=4" in capsys.readouterr().out


def stamped_record(**more):
    about = Case(SUITE, 6, 2, "float32").about
    parts = {f"{part}_s": 1e-6 for part in tax.PARTS}
    about |= {"op": "dispatch", "exchange": "freeio", "processes": 1}
    return {**about, "stamped_s": 5e-6, **parts, **more}


def tax_beside(path, *stamped):
    """The records of SUITE on two ranks, and these ones of a build with stamps."""
    path.write_text(json.dumps({"tax": stamped}))
    report = Report({})
    tax.run(
        report,
        [SUITE],
        devices=jax.devices()[:2],
        numbers_of_ranks=(2,),
        exchanges=["freeio"],
        dtype="float32",
        stamped=tax.read_stamped(path),
    )
    return report.data["tax"]


def test_parts_of_a_build_with_stamps_are_shown_beside_the_shipped_total(tmp_path):
    dispatch, combine = tax_beside(tmp_path / "stamped.json", stamped_record())
    assert dispatch["stamped_s"] == 5e-6
    assert dispatch["agreement_s"] == 1e-6
    assert dispatch["total_s"] == dispatch["wall_s"]
    assert math.isnan(combine["stamped_s"])
    assert "agreement_s" not in combine


def test_parts_of_another_shape_are_left_out(tmp_path):
    others = [stamped_record(dtype="bfloat16"), stamped_record(capacity=99)]
    others += [stamped_record(processes=2), stamped_record(exchange="freeio over NVSHMEM")]
    dispatch, _ = tax_beside(tmp_path / "stamped.json", *others)
    assert math.isnan(dispatch["stamped_s"])


def test_a_record_without_stamps_is_refused(tmp_path):
    path = tmp_path / "shipped.json"
    path.write_text(json.dumps({"tax": [{"op": "dispatch"}]}))
    with pytest.raises(ValueError, match="no record of a build with time stamps"):
        tax.read_stamped(path)


def test_pictures_of_parts(tmp_path):
    """Two shapes, three exchanges, and one whose parts are not known."""
    records = [
        stamped_record(name=name, exchange=exchange, op=op, total_s=6e-6, ideal_s=2e-6)
        for name in ("large", "small")
        for exchange in ("freeio", "ragged", "dense")
        for op in tax.OPS
    ]
    records.append({**records[0], "exchange": "reference", "agreement_s": None})
    tax.plot_parts(records, tmp_path / "parts.png")
    tax.plot_latency(records, tmp_path / "latency.png")
    assert tax._of_both_ops(records, "total_s")["large", 6, 2, "ragged"] == 12e-6
    assert (tmp_path / "parts.png").stat().st_size > 1000


def test_ours_by_the_stamps_of_every_run(monkeypatch):
    """Whatever the kernel's parts leave of the total is the rest."""
    taken = []

    def take(ordinal):
        taken.append(ordinal)
        return [(1000, 2000, [100, 200, 300, 400, 0])]

    native = SimpleNamespace(
        cuda=SimpleNamespace(
            take_timelines=take,
            phases=["opening", "routing", "agreeing", "moving", "finishing"],
        )
    )
    monkeypatch.setattr(tax, "_native", native)
    monkeypatch.setattr(tax, "_has_stamps", lambda devices: True)
    monkeypatch.setattr(tax, "_times", lambda *_: {"wall_s": 4e-6, "total_s": 3e-6})
    monkeypatch.setattr(tax, "STAMPED_RUNS", 2)
    report = Report({})
    tax.run(
        report,
        [SUITE],
        devices=jax.devices()[:2],
        numbers_of_ranks=(2,),
        exchanges=["freeio", "dense"],
        dtype="float32",
    )
    dispatch, combine = report.data["tax"]
    assert report.failed == 0
    assert (dispatch["exchange"], combine["exchange"]) == ("freeio", "freeio")
    # Before each run what earlier ones have left is taken.
    assert len(taken) == 2 * 2 * 2 * 2
    assert dispatch["kernel_s"] == pytest.approx(1e-6)
    parts = [dispatch[f"{part}_s"] for part in tax.PARTS]
    assert parts == pytest.approx([3e-7, 2e-7, 0, 4e-7, 2.1e-6])
    assert dispatch["stamped_s"] == dispatch["total_s"] == pytest.approx(sum(parts))


def test_xlas_by_the_profile_of_one_run(monkeypatch):
    """Per call, without the work that was launched ahead."""

    def record(run, folder=None, ahead=lambda: None):
        run()
        ahead()
        work = [Event("gpu0", "gemm", 0.0, 5.0)]
        own = [
            Event("gpu0", "ncclDevKernel_AllGather", 5.0, 2.0),
            Event("gpu0", "ncclDevKernel_SendRecv", 8.0, 6.0),
        ]
        return work if run() is None else work + own

    monkeypatch.setattr(tax.profile, "record", record)
    monkeypatch.setattr(tax.timing, "seconds_per_run", lambda run: 20.0)
    monkeypatch.setattr(tax.Case, "calls", 2)
    report = Report({})
    tax.run(
        report,
        [SUITE],
        devices=jax.devices()[:2],
        numbers_of_ranks=(2,),
        exchanges=["dense"],
        dtype="float32",
    )
    assert report.failed == 0
    record = report.data["tax"][0]
    assert (record["wall_s"], record["total_s"]) == (10.0, 4.5)
    assert [record[f"{part}_s"] for part in tax.PARTS] == [1.0, 0.0, 0.0, 3.0, 0.5]


def test_between_hosts_the_carrier_is_named():
    fio.config(host_size=1)
    report = Report({})
    try:
        tax.run(
            report,
            [SUITE],
            devices=jax.devices()[:2],
            numbers_of_ranks=(2,),
            exchanges=["freeio", "on-demand", "dense"],
            dtype="float32",
        )
    finally:
        fio.config(host_size=None)
    assert report.failed == 0
    names = ("freeio over XLA's collectives", "on-demand over XLA's collectives", "dense")
    expected = [(name, op) for name in names for op in tax.OPS]
    assert [(r["exchange"], r["op"]) for r in report.data["tax"]] == expected
