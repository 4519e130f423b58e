from __future__ import annotations

from pathlib import Path

import pytest

from steerserve.policy import PolicyFolder

from .documents import accept, document


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with one policy, `no-scam`."""
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "no-scam.yaml").write_bytes(document())
    return tmp_path / "policies"


@pytest.fixture
def folder(home: Path) -> PolicyFolder:
    """That folder, which is looked at on every call."""
    return PolicyFolder(home, accept, every=0)
