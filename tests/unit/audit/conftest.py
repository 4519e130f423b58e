from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from steerserve.audit import AuditLog, Record


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of some hundred lines in several files, closed."""
    folder = tmp_path_factory.mktemp("written")
    log = AuditLog(folder, fsync="never", max_bytes=9000, head_lines=20)
    for number in range(100):
        log.append(Record(event="request", request_id=f"request-{number}", outcome="ok", status=200)).result()
    log.close()
    return folder


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Callable[[], Path]:
    """A fresh copy of that log, each time."""

    def copy() -> Path:
        folder = tmp_path / "log"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(written, folder)
        return folder

    return copy
