"""A compiled graph holds the op where it was hooked, and is loaded only for an engine that hooks it there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from vllm.config import VllmConfig

from steerserve_vllm import register, setup
from tests.support.saes import make_sae
from tests.support.vllm_configs import engine_config


def test_the_compiled_graphs_key_knows_where_the_files_of_an_sae_hook_it(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register()

    def key(layer: int | None) -> str:
        if layer is not None:
            make_sae(tmp_path, "jumprelu", layer, seed=1)
        # As a new process would: what is served is opened once in each.
        monkeypatch.setattr(setup, "_catalogs", {})
        own = {"saes": [{"name": "a", "path": str(tmp_path)}]}
        return engine_config(models("llama"), additional_config={"steerserve": own}).compute_hash()

    first = key(1)
    assert key(None) == first
    assert key(2) != first
    assert key(1) == first
    unsteered = engine_config(models("llama"), additional_config={})
    assert unsteered.compute_hash() == VllmConfig.compute_hash.__wrapped__(unsteered)  # type: ignore[attr-defined]
