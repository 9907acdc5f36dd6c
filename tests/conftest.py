"""What every test runs under: no model hub, threads that leave the machine to others, Ctrl-C."""

import os
import signal

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

LONGEST = ["test_customer_service.py", "test_pipeline.py", "test_distributed.py", "test_fan_out.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: [*LONGEST, item.path.name].index(item.path.name))


@pytest.fixture(autouse=True)
def processes_heed_ctrl_c() -> None:
    """Undo what children would inherit: a SIGINT that is ignored.

    A shell makes its background jobs ignore it, and the command does so as it leaves (some tests
    run it in this process).
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
