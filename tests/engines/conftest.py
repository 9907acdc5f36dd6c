"""Tests against real serving engines: `make test-engines`, not part of `make test`."""

import pytest
from vllm_server import PYTHON


def pytest_collection_modifyitems(items):
    if not PYTHON.exists():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs vLLM (make vllm)"))


@pytest.fixture(autouse=True, scope="session")
def _no_proxy():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield
