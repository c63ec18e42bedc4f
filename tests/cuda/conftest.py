"""The emulator, built once for all tests and processes: see emulator/README.md.

And where tests find the modules in folders of this one.
"""

import sys
from pathlib import Path

import pytest

for folder in ("emulator", "network"):
    sys.path.insert(0, str(Path(__file__).parent / folder))


@pytest.fixture(scope="session")
def emulator_library():
    import build

    try:
        return build.library()
    except build.NotHereError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def _shared_machine():
    return []


@pytest.fixture
def machine(emulator_library, _shared_machine, rng):
    """Sixteen emulated GPUs with a schedule of this test's own."""
    from emulated import PROTOCOLS, Emulator

    if not _shared_machine:
        _shared_machine.append(Emulator(emulator_library, num_gpus=16, num_sms=16))
    shared = _shared_machine[0]
    shared.set_hosts(0, 0)
    shared.set_num_sms(5)
    shared.set_overlap_num_sms(2)
    shared.starts_num_sms = None
    shared.set_protocol(PROTOCOLS[0])
    shared.set_seed(rng.integers(2**32))
    yield shared
    if shared.is_broken():
        _shared_machine.clear()


@pytest.fixture
def protocol(request, machine):
    """One of emulated.PROTOCOLS: parametrized indirectly."""
    machine.set_protocol(request.param)


@pytest.fixture
def new_machine(emulator_library, rng):
    """Makes machines for tests after which their engines take no further calls."""
    from emulated import Emulator

    machines = []

    def make(**options):
        options = {"seed": rng.integers(2**32), "num_gpus": 4, "num_sms": 4, **options}
        machines.append(Emulator(emulator_library, **options))
        return machines[-1]

    yield make
    for made in machines:
        made.close()
