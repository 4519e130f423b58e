"""What every test shares: the network stays out, and the folder a test lies in says what it needs."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is no failure: no test here is about time.
settings.register_profile("steerserve", deadline=None)
settings.load_profile("steerserve")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

MARKER_OF_FOLDER = {"engine": "engine", "server": "server", "faults": "server"}
ORDER = ["unit", "engine", "server", "faults"]
TESTS = Path(__file__).parent


def folder_of(item: pytest.Item) -> str:
    """The folder of tests/ that the test lies in."""
    return item.path.relative_to(TESTS).parts[0]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by folder, and run the fast folders first; within one, the order stays."""
    for item in items:
        if marker := MARKER_OF_FOLDER.get(folder_of(item)):
            item.add_marker(marker)
    items.sort(key=lambda item: ORDER.index(folder_of(item)) if folder_of(item) in ORDER else -1)
