import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Two workers share two cores; small tensors gain nothing from more threads."""
    torch.set_num_threads(1)
