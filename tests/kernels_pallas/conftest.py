import jaxtyping
import pytest


@pytest.fixture
def unchecked():
    """As users call the ops: without the checks of annotations that the other tests run under."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
