"""What freeio_jax.info says, as a function and on the command line."""

import os
import subprocess
import sys

import jax

from freeio_jax.grouped_matmul import implementation
from freeio_jax.info import info


def test_names_versions_devices_engine_settings_and_the_grouped_matmul():
    told = info()
    assert f"jax {jax.__version__}" in told["versions"]
    assert told["devices"].startswith(f"{jax.device_count()} x ")
    assert "timeout=" in told["settings"]
    assert implementation(jax.default_backend()).name in told["grouped matmul"]


def test_command_line():
    out = subprocess.run(
        [sys.executable, "-m", "freeio_jax.info"],
        env=os.environ | {"FREEIO_TIMEOUT": "12.5"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "timeout=12.5" in out
    assert "grouped matmul:" in out


def test_without_flax_the_layers_say_what_to_install():
    program = (
        "import sys; sys.modules['flax'] = None\n"
        "import freeio_jax\n"
        "try: import freeio_jax.flax\n"
        "except ImportError as error: print(error)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert "pip install 'freeio_jax[flax]'" in out
