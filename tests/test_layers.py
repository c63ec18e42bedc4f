"""Which folder of xla_ffi/ may know which: no engine knows the other, and pod/ knows none."""

import re
from pathlib import Path

import pytest

ENGINE = Path(__file__).parents[1] / "xla_ffi"

#: The folders whose headers the files of each folder include.
KNOWN = {
    "core": {"core"},
    "pod": {"core", "pod"},
    "cpu": {"core", "pod", "cpu"},
    "cuda": {"core", "pod", "cuda"},
    "hosts": {"core", "pod", "cuda", "hosts"},
}


@pytest.mark.parametrize("folder", sorted(KNOWN))
def test_a_folder_includes_what_it_may_know(folder):
    sources = [path for path in (ENGINE / folder).rglob("*") if path.is_file()]
    assert sources
    for path in sources:
        included = set(re.findall(r'^#include "(\w+)/', path.read_text(), re.MULTILINE))
        included &= set(KNOWN)  # not XLA's
        assert included <= KNOWN[folder], f"{path.relative_to(ENGINE)} includes {included}"


def test_every_folder_is_in_the_table():
    assert {path.name for path in ENGINE.iterdir() if path.is_dir()} == set(KNOWN)
