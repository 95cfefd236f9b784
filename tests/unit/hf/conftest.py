import pytest

from tests.unit.hf.preloaded_logits import use_alone

REAL = "test_each_model_is_in_a_process_of_its_own"


@pytest.fixture(autouse=True)
def preloaded_logits(request, monkeypatch):
    """All tests but the one of that name."""
    if request.node.originalname != REAL:
        use_alone(monkeypatch)
