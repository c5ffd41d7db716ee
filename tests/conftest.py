import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from memvir import download
from tests.http_server import MisbehavingServer

# the same examples every time; `pytest --hypothesis-profile=search` looks for new ones
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("search", derandomize=False, deadline=None, max_examples=2000)
settings.load_profile("repeatable")

# whoever runs the suite may ignore signals (nohup, a job in a script's background); what it starts must hear them
for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(stop) == signal.SIG_IGN:
        signal.signal(stop, signal.default_int_handler if stop == signal.SIGINT else signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest goes first, so that two workers end at about the same time."""
    items.sort(key=lambda item: "test_pipeline" not in item.nodeid)  # the rest stays in its order


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Two workers share two cores; small tensors gain nothing from more threads."""
    torch.set_num_threads(1)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MisbehavingServer]:
    """A local server for downloads, which do not wait between their tries."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "WAITS", (0.0, 0.0))
    with MisbehavingServer() as server:
        yield server
