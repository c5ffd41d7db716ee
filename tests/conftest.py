from collections.abc import Iterator

import pytest
import torch

from memvir import download
from tests.http_server import MisbehavingServer


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
