"""What is checked before anything is patched, and before anything is served. No engine is started."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import nn
from vllm import PoolingParams, SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs import EmbedsPrompt, TextPrompt, TokensPrompt
from vllm.model_executor.offloader.prefetch import PrefetchOffloader
from vllm.sampling_params import BeamSearchParams
from vllm.v1.engine.input_processor import InputProcessor

from steerserve.errors import CheckpointError, ConfigError, IncompatibleError
from steerserve.server.names import means_us
from steerserve_vllm import register, runner_v1, runner_v2, seams
from steerserve_vllm.layers import find_layers, hook_points
from steerserve_vllm.seams import FRONT_END_SEAMS, SEAMS, Seam
from tests.support.models import VOCAB
from tests.unit.catalogs import make_catalog

# Of the requests that a server takes.
PROTOCOLS = (
    "anthropic", "generate.base", "generate.structured_decisions", "openai.chat_completion",
    "openai.completion", "openai.models", "openai.responses", "pooling.base", "pooling.classify",
    "pooling.embed", "pooling.pooling", "pooling.scoring", "scale_out.token_in_token_out", "serve.engine",
    "serve.lora", "serve.tokenize", "speech_to_text.transcription", "speech_to_text.translation",
)  # fmt: skip


def test_registering_twice_wraps_once() -> None:
    register()
    wrapped = InputProcessor.process_inputs
    register()
    assert InputProcessor.process_inputs is wrapped


def test_every_seam_fits_this_vllm() -> None:
    assert {seam.problem() for seam in (SEAMS | FRONT_END_SEAMS).values()} == {None}


def test_no_name_that_vllm_declares_means_us() -> None:
    modules = [importlib.import_module(f"vllm.entrypoints.{name}.protocol") for name in PROTOCOLS]
    models = [
        model
        for module in modules
        for model in vars(module).values()
        if isinstance(model, type) and issubclass(model, BaseModel)
    ]
    names = {name for model in models for name in model.model_fields}
    names |= {str(field.alias) for model in models for field in model.model_fields.values()}
    for struct in (SamplingParams, BeamSearchParams, PoolingParams):
        names |= {*struct.__struct_fields__, *vars(struct)}
    for prompt in (TextPrompt, TokensPrompt, EmbedsPrompt):
        names |= set(prompt.__annotations__)
    assert {"messages", "stop", "structured_outputs", "input_schema", "extra_args", "prompt"} <= names
    assert len(names) > 300
    assert {name for name in names if means_us(name)} == set()


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


@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_a_runner_drives_the_runtime_that_it_speaks_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interpreted: str
) -> None:
    """V2 tells of a step by tensors on the device also where that is a CPU, V1 by arrays in any case."""
    # Before the variable is set, which decides for good whether kernels are interpreted; and not at the top,
    # where a worker that looks for kernels would meet numba.
    from steerserve.runtime.device import DeviceRuntime
    from steerserve.runtime.host import HostRuntime

    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    catalog = make_catalog(tmp_path)
    for runner, kind in ((runner_v1, HostRuntime), (runner_v2, DeviceRuntime)):
        opened = runner._open_runtime(
            catalog, [2, 3], device="cpu", max_requests=2, max_tokens=8, vocab=VOCAB
        )
        assert type(opened) is kind
    with pytest.raises(IncompatibleError, match="in host memory, got one on meta"):
        runner_v1._open_runtime(catalog, [2, 3], device="meta", max_requests=2, max_tokens=8, vocab=VOCAB)


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
        hook_points(find_layers(_Owner(_SkipsTheSum), 3), [2], 8, dtype=torch.float32, device="cpu")


def test_layers_whose_forward_was_replaced_are_refused() -> None:
    """Offloading puts its own forward on the layer, which would be called in place of the one with the op."""
    owner = _Owner(_Layer)
    hook: Callable[..., None] = PrefetchOffloader._hook_module_forward
    hook(None, 0, owner.layers0[1])
    with pytest.raises(IncompatibleError, match=r"layers \[1\] was replaced, which offloading"):
        find_layers(owner, 3)


class _TakesNormedEmbeddings(nn.Module):
    """Like DeepSeek-V3.2's first layer: attention reads what was made of the embeddings before it."""

    def forward(self, hidden_states: torch.Tensor, attn_in: torch.Tensor | None = None) -> torch.Tensor:
        return hidden_states if attn_in is None else hidden_states + attn_in


class _TakesMore(nn.Module):
    """The same under a name that nobody knows."""

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, more: torch.Tensor | None = None
    ) -> torch.Tensor:
        return hidden_states if more is None else hidden_states + more


def test_a_layer_that_reads_more_than_the_embeddings_is_not_steered_before_it() -> None:
    message = r"more than the embeddings that resid_pre\.0"
    with pytest.raises(IncompatibleError, match=message):
        _hooked(_TakesNormedEmbeddings, 0)
    _hooked(_TakesNormedEmbeddings, 1)
    first, positions, embedded = _hooked(_TakesMore, 0), torch.arange(4), torch.zeros(4, 8)
    assert torch.equal(first(positions, embedded), embedded)
    with pytest.raises(IncompatibleError, match=message):
        first(positions, embedded, embedded + 1)
    with pytest.raises(IncompatibleError, match=message):
        first(positions, hidden_states=embedded, more=embedded + 1)


def _hooked(layer: Callable[[], nn.Module], point: int) -> nn.Module:
    layers = find_layers(_Owner(layer), 3)
    hook_points(layers, [point], 8, dtype=torch.float32, device="cpu")
    return layers.layers[0]
