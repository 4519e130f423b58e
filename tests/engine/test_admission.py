"""Admission of `vllm_xargs`: read from disk beside the event loop, and remembered for any thread."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor

from steerserve.catalog import Catalog, build_catalog
from steerserve.config import SaeConfig, SteerserveConfig
from steerserve.errors import RequestError
from steerserve.sae.formats import common
from steerserve.sae.reader import RowReader
from steerserve_vllm import admission
from tests.support.models import D_MODEL, N_LAYERS
from tests.support.saes import make_sae

PATIENCE = 60.0


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    """One SAE, opened as those are that are too large to be read at the start."""
    monkeypatch.setattr(common, "OPENED_WHOLE", 0)
    entry = SaeConfig(name="demo", path=make_sae(tmp_path / "demo", "jumprelu", 2))
    return build_catalog(SteerserveConfig(saes=[entry]), n_layers=N_LAYERS, d_model=D_MODEL)


def text(value: float, feature: int = 5) -> str:
    return json.dumps({"interventions": [{"feature": feature, "op": "clamp", "value": value}]})


def client(catalog: Catalog) -> Any:
    """vLLM's own, without an engine: what a request meets up to where it is admitted."""
    found: Any = AsyncLLM.__new__(AsyncLLM)
    found.input_processor = InputProcessor.__new__(InputProcessor)
    setattr(found.input_processor, admission._CATALOG, catalog)
    return found


def test_what_a_request_needs_of_the_disk_is_read_while_the_event_loop_goes_on(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, others, threads = threading.Event(), threading.Event(), list[int]()
    gather = RowReader._gather

    def slow(*args: Any) -> bytearray:
        asked.set()
        threads.append(threading.get_ident())
        assert others.wait(PATIENCE)
        return gather(*args)

    monkeypatch.setattr(RowReader, "_gather", slow)

    async def admitting(self: Any, request_id: str, prompt: Any, params: Any) -> Any:
        """As vLLM's does, on the event loop."""
        return admission._compiled(params.extra_args["steering"], catalog)

    async def go() -> Any:
        params = SamplingParams(extra_args={"steering": text(1.0)})
        request = asyncio.create_task(
            admission._wrap_add_request(admitting)(client(catalog), "r", [5], params)
        )
        assert await asyncio.to_thread(asked.wait, PATIENCE)
        others.set()
        return await request

    _, plan = asyncio.run(go())
    assert plan.rows[0].feature == 5
    assert threading.get_ident() not in threads


def test_what_is_refused_is_refused_by_admission(catalog: Catalog) -> None:
    async def admitting(self: Any, request_id: str, prompt: Any, params: Any) -> Any:
        return admission._compiled(params.extra_args["steering"], catalog)

    params = SamplingParams(extra_args={"steering": text(1.0, feature=999)})
    with pytest.raises(RequestError, match="got 999"):
        asyncio.run(admission._wrap_add_request(admitting)(client(catalog), "r", [5], params))


class Yielding(str):
    """Lets another thread run whenever it is looked up."""

    def __hash__(self) -> int:
        time.sleep(0)
        return super().__hash__()


def test_plans_are_remembered_for_each_catalog_and_by_many_threads(tmp_path: Path) -> None:
    catalogs = []
    for number in range(2):
        entry = SaeConfig(name="demo", path=make_sae(tmp_path / str(number), "jumprelu", 2, seed=number))
        catalogs.append(build_catalog(SteerserveConfig(saes=[entry]), n_layers=N_LAYERS, d_model=D_MODEL))
    # More than are remembered.
    texts = [Yielding(text(float(value))) for value in range(1200)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda t: admission._compiled(t, catalogs[0])[1].digest, texts * 2))
    assert found[:1200] == found[1200:]
    assert len(set(found)) == 1200
    assert admission._compiled(texts[0], catalogs[1])[1].digest != found[0]
    assert admission._compiled(texts[0], catalogs[0])[1] is admission._compiled(texts[0], catalogs[0])[1]
