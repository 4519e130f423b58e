"""One server for every attack; it must live through all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server import conftest as plain
from tests.server.attack import running
from tests.server.attack.running import Attacked


@pytest.fixture(scope="session")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    with running.start(tmp_path_factory.mktemp("attacked")) as found:
        yield found


@pytest.fixture(autouse=True)
def _log_on_failure(attacked: Attacked, request: pytest.FixtureRequest) -> Iterator[None]:
    failed = request.session.testsfailed
    yield
    died = attacked.server.process.poll() is not None and not attacked.killed
    if request.session.testsfailed > failed or died:
        print(plain._tail(attacked.server.log))
    assert not died, "the server died:\n" + plain._tail(attacked.server.log)
