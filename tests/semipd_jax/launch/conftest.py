import pytest
from launch_rig import TESTS


@pytest.fixture(autouse=True)
def _fakes_importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
