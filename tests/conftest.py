"""What every test shares: the network stays out, and the folder a test lies in says what it needs.

Units run in any order. Tests with an engine or a server are sorted by what they start, and run in one
process, for a start costs seconds, and engines that run at once starve each other.
"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is imported, here and in what tests start: two processes of tests share two cores, and OpenMP's
# threads do not outlive a fork.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from tests.support import fork_server, forking
from tests.support.one import OneAtATime

pytest_plugins = ["tests.support.times"]

# A busy machine is no failure: no test here is about time.
settings.register_profile("steerserve", deadline=None)
settings.load_profile("steerserve")

STARTING = ["engine", "server"]
SERVERS = ["attacked", "several", "server", "demo"]
TESTS = Path(__file__).parent
NUMBER = pytest.StashKey[int]()
_numbers = itertools.count()


def folder_of(item: pytest.Item) -> str:
    """The folder of tests/ that the test lies in."""
    return item.path.relative_to(TESTS).parts[0]


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test by its folder."""
    item.stash[NUMBER] = next(_numbers)
    if (folder := folder_of(item)) in STARTING:
        item.add_marker(folder)


class Scheduling(LoadScopeScheduling):
    """Lets one process of pytest-xdist have all engines and servers, and each file of units stay in one."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "engines" if file.split("/")[1] in STARTING else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Hand out tests as they are ordered below."""
    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put units first, for they are fast; under pytest-xdist last, for there one process has the engines."""
    units = [item for item in items if folder_of(item) not in STARTING]
    others = sorted((item for item in items if folder_of(item) in STARTING), key=_place)
    items[:] = others + units if hasattr(config, "workerinput") else units + others


def _place(item: pytest.Item) -> tuple[object, ...]:
    """By folder, by the engine or server that is started, by file, and as written."""
    names = getattr(item, "fixturenames", ())
    options = item.callspec.params.get("engine") if hasattr(item, "callspec") else None
    started = repr(sorted(options.items(), key=repr)) if "engine" in names and options else ""
    server = next((number for number, name in enumerate(SERVERS, 1) if name in names), 0)
    return STARTING.index(folder_of(item)), started, server, str(item.path), item.stash[NUMBER]


@pytest.fixture(scope="session")
def running() -> Iterator[OneAtATime]:
    """The engine or server that runs now, which tests share that need the same."""
    # Both import in the background.
    forking.prepare()
    fork_server.start()
    with OneAtATime() as one:
        yield one
