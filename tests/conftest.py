"""Eight CPU devices by default, a seed for every random test, and a bound on every test's time.

In a pod (see pod_run.py) every process runs every test.
"""

import importlib.metadata
import os
import random
import zlib

import numpy as np
import pytest

# All of this before JAX is imported, which reads it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAGS = {
    "xla_force_host_platform_device_count": 8,
    # XLA ends the process if a device comes to a collective more than 40 s after another one. On a
    # crowded machine that can happen without a fault.
    "xla_cpu_collective_call_terminate_timeout_seconds": 170,
}
#: Tests spend most of their time on compiling small programs. With these flags XLA:CPU takes half.
#: XLA_FLAGS=--xla_backend_optimization_level=3 leaves XLA as users have it.
COMPILE_FAST = {"xla_backend_optimization_level": 0}
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    # A newer XLA has these emitters alone, and takes the flag for an error.
    COMPILE_FAST["xla_cpu_use_fusion_emitters"] = "false"
flags = os.environ.get("XLA_FLAGS", "")
if os.environ["JAX_PLATFORMS"] == "cpu" and "xla_backend_optimization_level" not in flags:
    FLAGS |= COMPILE_FAST
missing = (f"--{name}={value}" for name, value in FLAGS.items() if name not in flags)
os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()
# Products of float32 in float32, also on GPUs: they are compared with numpy's.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

TEST_TIMEOUT_SECONDS = 180

#: The variable that gives all random tests their seed: the same numbers in each run of a commit.
SEED = "TESTS_SEED"


def pytest_addoption(parser):
    parser.addoption(
        "--seed",
        type=int,
        default=int(os.environ.get(SEED) or random.SystemRandom().randrange(2**32)),
        help=f"seed of the `rng` fixture; drawn anew in each run unless given here or as {SEED}",
    )


@pytest.hookimpl(trylast=True)  # once the terminal reporter is there
def pytest_configure(config):
    import pod_run

    if os.environ.get(SEED) and config.pluginmanager.hasplugin("hypothesispytest"):
        import hypothesis

        hypothesis.settings.register_profile("same", derandomize=True)
        hypothesis.settings.load_profile("same")
    if pod_run.is_pod():
        pod_run.join(config)


def pytest_ignore_collect(collection_path):
    """Tests that start processes of their own do so once, not in every process of a pod."""
    import pod_run

    return True if pod_run.is_pod() and pod_run.is_left_out(collection_path) else None


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_xdist_make_scheduler(config, log):
    """Each worker gets a share of the tests, in order; one that has finished takes from another's.

    Tests of one file share compiled programs and fixtures. xdist's default deals them out to all
    workers, and each of these compiles the programs for itself.
    """
    if config.getvalue("dist") != "load":  # what `-n` alone means
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_report_header(config):
    import jax

    devices = jax.devices()
    return (
        f"jax {jax.__version__}, {len(devices)} {devices[0].platform} devices of "
        f"{jax.process_count()} process(es), "
        f"random tests: --seed={config.getoption('seed')}"
    )


@pytest.fixture(scope="session", autouse=True)
def _poisoned_tails():
    """Rows that zero_tail=False leaves unspecified are NaN, in every test on CPU."""
    from freeio_jax import _native

    _native.poison_tails(True)


def pytest_collection_modifyitems(items):
    # A thread watches the time: a test that hangs inside a native call does not see a signal.
    for item in items:
        if item.config.pluginmanager.hasplugin("timeout") and not item.get_closest_marker(
            "timeout"
        ):
            item.add_marker(pytest.mark.timeout(TEST_TIMEOUT_SECONDS, method="thread"))


@pytest.fixture
def rng(request):
    """A generator of its own for each test; the seed is shown when the test fails."""
    seed = request.config.getoption("seed")
    print(f"rerun with --seed={seed}")
    return np.random.default_rng([seed, zlib.crc32(request.node.nodeid.encode())])
