"""One server for every attack; it must live through all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server import conftest as plain
from tests.server.attack.running import Attacked, start
from tests.support.one import OneAtATime


@pytest.fixture(scope="module")
def attacked(running: OneAtATime, tmp_path_factory: pytest.TempPathFactory) -> Attacked:
    return running.get("attacked", lambda: start(tmp_path_factory.mktemp("attacked")))


@pytest.fixture(autouse=True)
def _log_on_failure(attacked: Attacked, request: pytest.FixtureRequest) -> Iterator[None]:
    failed = request.session.testsfailed
    yield
    died = attacked.server.process.poll() is not None and not attacked.killed
    if request.session.testsfailed > failed or died:
        print(plain.tail(attacked.server.log))
    assert not died, "the server died:\n" + plain.tail(attacked.server.log)
