"""What tests of the benchmark share."""

import few_calls as few
import pytest


@pytest.fixture
def few_calls(monkeypatch):
    for where, name, value in few.FEW:
        monkeypatch.setattr(where, name, value)
