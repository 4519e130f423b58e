"""What may have to wait for a disk does so beside the event loop: another request is answered meanwhile."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp

from steerserve.access.keyring import KeyRing
from steerserve.catalog import Catalog, build_catalog
from steerserve.config import SaeConfig, SteerserveConfig
from steerserve.policy import folder
from steerserve.policy.enforcement import Enforcement
from steerserve.report import Reporter
from steerserve.sae.formats import common
from steerserve.sae.reader import RowReader
from steerserve.server.collector import ReportCollector
from steerserve.server.guard import KeyGuard
from steerserve.server.middleware import SteeringMiddleware
from steerserve.server.state import SteeringState
from tests.support.models import D_MODEL, N_LAYERS
from tests.support.saes import make_sae

from .conftest import Engine, make_app

STEERING = {"interventions": [{"feature": 5, "op": "clamp", "value": 2.0}]}
PATIENCE = 60.0  # seconds; only a loop that is blocked waits so long


class Disk:
    """What hangs, once, until another request was answered."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.asked, self.others_answered = threading.Event(), threading.Event()
        self.was_in_time: list[bool] = []

    def hang(self, *args: Any) -> Any:
        if not self.asked.is_set():
            self.asked.set()
            self.was_in_time.append(self.others_answered.wait(PATIENCE))
        return self.original(*args)


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    """One SAE, opened as those are that are too large to be read at the start."""
    monkeypatch.setattr(common, "OPENED_WHOLE", 0)
    entry = SaeConfig(name="demo", path=make_sae(tmp_path / "demo", "jumprelu", 2))
    built = build_catalog(SteerserveConfig(saes=[entry]), n_layers=N_LAYERS, d_model=D_MODEL)
    return replace(built, policy_rows=64)


@pytest.fixture
def state(catalog: Catalog) -> SteeringState:
    return SteeringState(catalog, ReportCollector(Engine().collect), Reporter(catalog))


def check_others_are_answered(app: ASGIApp, disk: Disk, slow: dict[str, Any], status: int = 200) -> None:
    """A request meets the disk; one that comes later is answered first."""

    async def go() -> tuple[int, int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
            first = asyncio.create_task(client.post("/v1/completions", json=slow))
            assert await asyncio.to_thread(disk.asked.wait, PATIENCE)
            second = await client.post("/v1/completions", json={})
            disk.others_answered.set()
            return second.status_code, (await first).status_code

    assert asyncio.run(go()) == (status, status)
    assert disk.was_in_time == [True]


def test_a_feature_that_is_read_from_disk_delays_no_other_request(
    state: SteeringState, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(RowReader._gather)
    monkeypatch.setattr(RowReader, "_gather", lambda *args: disk.hang(*args))
    check_others_are_answered(SteeringMiddleware(make_app(Engine()), state), disk, {"steering": STEERING})


def test_a_folder_of_policies_that_hangs_delays_no_other_request(
    state: SteeringState, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = [{"name": "w", "sae": "demo", "feature": 3}]
    document = {"name": "p", "version": 1, "mode": "enforce", "owner": "o", "reason": "r", "watch": watch}
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "p.yaml").write_text(json.dumps(document))
    state.enforcement = Enforcement(tmp_path / "policies", catalog, every=0)
    disk = Disk(folder.list_folder)
    monkeypatch.setattr(folder, "list_folder", disk.hang)
    check_others_are_answered(SteeringMiddleware(make_app(Engine()), state), disk, {})


def test_a_key_file_that_hangs_delays_no_other_request(
    state: SteeringState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys.yaml").write_text("version: 1\nkeys: []\n")
    state.keys, state.server_keys = KeyRing(tmp_path / "keys.yaml"), ()
    monkeypatch.setattr("steerserve.access.keyring.CHECK_EVERY", 0.0)
    disk = Disk(KeyRing._stamp)
    monkeypatch.setattr(KeyRing, "_stamp", lambda *args: disk.hang(*args))
    # Neither brings a key.
    check_others_are_answered(KeyGuard(make_app(Engine()), state), disk, {}, status=401)
