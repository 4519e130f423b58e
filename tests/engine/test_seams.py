"""What is checked before anything is patched, and before anything is served. No engine is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.input_processor import InputProcessor

from steerserve.errors import CheckpointError, ConfigError, IncompatibleError
from steerserve_vllm import register, seams
from steerserve_vllm.layers import find_layers, hook_points
from steerserve_vllm.seams import FRONT_END_SEAMS, SEAMS, Seam


def test_registering_twice_wraps_once() -> None:
    register()
    wrapped = InputProcessor.process_inputs
    register()
    assert InputProcessor.process_inputs is wrapped


def test_every_seam_fits_this_vllm() -> None:
    assert {seam.problem() for seam in (SEAMS | FRONT_END_SEAMS).values()} == {None}


def test_a_vllm_that_differs_is_refused_with_what_differs_and_what_was_tested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moved = Seam("vllm.v1.engine.input_processor", "InputProcessor.process", ("self",))
    changed = Seam("vllm.v1.engine.input_processor", "InputProcessor.process_inputs", ("self", "prompt"))
    monkeypatch.setitem(seams.SEAMS, "moved", moved)
    monkeypatch.setitem(seams.SEAMS, "changed", changed)
    with pytest.raises(IncompatibleError, match=r"0\.32\.0 tested.*process does not exist.*takes \('self'"):
        seams.check()


def test_a_version_that_nobody_has_compared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.34.0")
    with pytest.raises(IncompatibleError, match=r"vLLM 0\.34\.0 differs.*expected vLLM 0\.32 or 0\.33"):
        seams.check()
    monkeypatch.setattr("vllm.__version__", "0.33.1+cpu")
    seams.check()


def test_an_unfit_vllm_refuses_a_steering_configuration_and_runs_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(VllmConfig, "__post_init__", lambda self: None)
    seams.refuse_configuration(IncompatibleError("this vLLM differs"))
    assert VllmConfig(additional_config={}) is not None
    with pytest.raises(IncompatibleError, match="this vLLM differs"):
        VllmConfig(additional_config={"steerserve": {}})


@pytest.mark.parametrize(
    ("steerserve", "options", "error", "says"),
    [
        ({"saes": [{"name": "a", "path": "/nowhere"}]}, {}, CheckpointError, "/nowhere"),
        ({"saes": [{"name": "a", "path": "SAE", "layer": 9}]}, {}, ConfigError, "expected `layer` < 4"),
        ({"saes": [{"name": "a", "path": "SAE"}] * 2}, {}, ConfigError, "unique names"),
        ({"saes": [{"name": "a", "path": "TOP"}]}, {}, ConfigError, "expected `resident: true`.*top-k"),
        ({"sae": []}, {}, ConfigError, "steerserve.sae"),
        ({}, {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
         IncompatibleError, "KV connector"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_exactly_is_refused_before_the_engine_starts(
    models: Callable[[str], Path],
    assets: dict[str, Any],
    steerserve: dict[str, Any],
    options: dict[str, Any],
    error: type[Exception],
    says: str,
) -> None:
    register()
    for sae in steerserve.get("saes", []):
        name = {"SAE": "jump", "TOP": "top"}.get(sae["path"])
        sae["path"] = str(assets["saes"][name][0]) if name else sae["path"]
    config = EngineArgs(
        model=str(models("llama")), additional_config={"steerserve": steerserve}, **options
    ).create_engine_config()
    with pytest.raises(error, match=says):
        InputProcessor(config)


class _Layer(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


class _Owner(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module], lists: int = 1) -> None:
        super().__init__()
        for i in range(lists):
            setattr(self, f"layers{i}", nn.ModuleList(layer() for _ in range(3)))


class _SkipsTheSum(nn.Module):
    """Like Cohere's layers: it hands on a residual which the next norm does not add."""

    class LayerNorm(nn.Module):
        def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
            return x, residual

    def __init__(self) -> None:
        super().__init__()
        self.norm = self.LayerNorm()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None) -> Any:
        return hidden_states, residual


@pytest.mark.parametrize("lists", [0, 2])
def test_a_model_whose_layers_are_not_found_for_certain_is_refused(lists: int) -> None:
    with pytest.raises(IncompatibleError, match=f"found {lists}"):
        find_layers(_Owner(_Layer, lists), 3)


def test_a_model_whose_stream_is_not_the_sum_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="does not add"):
        hook_points(find_layers(_Owner(_SkipsTheSum), 3), [2], 8)
