"""Files from the network."""

from collections.abc import Iterable, Iterator

from tqdm import tqdm


def progress(items: Iterable, total: int, what: str, unit: str) -> Iterator:
    """Iterate with a progress bar on a terminal, silently elsewhere."""
    return iter(tqdm(items, total=total, desc=what, unit=f" {unit}s", disable=None, leave=False))
