"""What is made of a profile, on made-up ones: there is none without a GPU."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from freeio_jax.bench import profile
from freeio_jax.bench.floor import KERNELS
from freeio_jax.bench.profile import Event


def test_busy_counts_overlaps_once():
    events = [Event("a", "x", start, 2.0) for start in (5.0, 0.0, 1.0, 5.5)]
    assert profile.busy(events) == 3.0 + 2.5
    assert profile.busy([Event("a", "x", 0.0, 9.0), Event("a", "x", 1.0, 1.0)]) == 9.0
    assert profile.busy([]) == 0.0


@pytest.mark.parametrize(
    ("name", "communicates"),
    [
        ("void freeio::cuda::dispatch_large_kernel<uint4>(Params)", True),
        ("combine_transpose_kernel", True),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", True),
        ("void xla::gpu::RaggedAllToAllKernel<128>()", True),
        ("MemcpyP2P", True),
        ("MemcpyD2D", False),
        ("loop_gather_fusion_3", False),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", False),
    ],
)
def test_what_communicates(name, communicates):
    assert bool(profile.COMMUNICATION.search(name)) == communicates


def test_each_kernel_of_an_exchange_is_found_by_one_name():
    """Kernels are named in CUDA, and found in profiles by these names."""
    sources = Path(__file__).parents[2] / "xla_ffi" / "cuda"
    kernels = {
        name
        for folder in ("dispatch", "combine")
        for source in (sources / folder).glob("*.cu*")
        for name in re.findall(
            r"__global__[^(]*?(?:\([^)]*\)\s*)?(\w+_kernel)\(", source.read_text()
        )
    }
    assert len(kernels) >= 6
    for kernel in kernels:
        assert sum(bool(re.search(pattern, kernel)) for pattern in KERNELS.values()) == 1, kernel
        assert profile.COMMUNICATION.search(kernel)
    for pattern in KERNELS.values():
        assert any(re.search(pattern, kernel) for kernel in kernels), pattern


def test_shares_are_means_over_the_devices():
    events = [
        Event("gpu0", "gemm", 0.0, 6.0),
        Event("gpu0", "dispatch_small_kernel", 8.0, 2.0),
        Event("gpu1", "gemm", 0.0, 4.0),
        Event("gpu1", "ncclDevKernel", 3.0, 3.0),
    ]
    shares = profile.shares(events)
    assert shares == {
        "span_s": 8.0,
        "busy_s": 7.0,
        "communication_s": 2.5,
        "communication_share": 2.5 / 8.0,
    }
    assert profile.longest(events, 2) == {"gemm": 5.0, "ncclDevKernel": 1.5}
    assert profile.durations(events, KERNELS["dispatch"]) == [2.0]
    assert profile.shares([]) == {}


def test_only_the_streams_of_a_plane_count():
    event = SimpleNamespace(name="dispatch_kernel", start_ns=5.0, duration_ns=2000.0)
    stream = SimpleNamespace(name="Stream #13(Compute,MemcpyD2D)", events=[event])
    derived = SimpleNamespace(name="XLA Ops", events=[event, event])
    for lines, number in (([stream, derived], 1), ([derived], 2)):
        plane = SimpleNamespace(name="/device:GPU:0", lines=iter(lines))
        events = profile.events_of_plane(plane)
        assert len(events) == number
        assert events[0].duration == pytest.approx(2e-6)


def test_a_run_without_gpus_has_no_events():
    assert profile.record(lambda: 1) == []
