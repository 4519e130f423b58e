"""What cannot be steered exactly is refused at start-up; the table in the docs says what the tests say."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.config import DeviceConfig, OffloadConfig, PrefetchOffloadConfig, VllmConfig

from steerserve.errors import IncompatibleError
from steerserve_vllm import compat
from steerserve_vllm import refusals as refusals_module
from steerserve_vllm.refusals import refusals
from steerserve_vllm.setup import catalog_for, check_engine, enforcement_for
from tests.support import fork_server
from tests.support.combinations import PAGE, RUNNERS, combination
from tests.support.vllm_configs import change, engine_config, parallel, speculative, write_config

Change = Callable[[VllmConfig], None]


def refused(feature: str, reason: str, *changes: Change, **options: Any) -> Any:
    """A case: this reason is given, once these changes are made, or with these options of the engine."""
    return pytest.param(changes, options, reason, marks=combination(feature, refused=reason), id=feature)


def setting(name: str, value: Any) -> Change:
    return lambda config: change(config, name, value)


def shared(**sizes: Any) -> Change:
    return lambda config: parallel(config, **sizes)


def speculating(**settings: Any) -> Change:
    return lambda config: speculative(config, **settings)


def on_a_gpu(config: VllmConfig) -> None:
    config.device_config = DeviceConfig(device="cuda")


def drafting(config: VllmConfig) -> None:
    """With the model as its own draft."""
    speculative(config, method="draft_model", model=config.model_config.model)


def prefetching(**settings: Any) -> Change:
    return setting("offload_config", OffloadConfig(**settings))


NGRAM = speculating(method="ngram", prompt_lookup_max=2)
CASES = [
    refused(
        "KV connector",
        "a KV connector keys blocks without the plan",
        kv_transfer_config={"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
    ),
    refused(
        "sequence-parallel experts",
        "sequence-parallel experts split the stream between ranks",
        shared(tensor_parallel_size=2, data_parallel_size=2, enable_expert_parallel=True),
    ),
    refused(
        "sequence parallelism",
        "sequence parallelism splits the stream between ranks",
        shared(tensor_parallel_size=2, enable_hc_sp=True),
    ),
    refused(
        "context parallelism",
        "context parallelism splits a request's tokens",
        shared(tensor_parallel_size=2, decode_context_parallel_size=2),
    ),
    refused("micro-batching (DBO)", "micro-batching splits a step's tokens", shared(enable_dbo=True)),
    refused(
        "fast prefill",
        "fast prefill leaves out tokens of a prompt in later layers",
        kv_sharing_fast_prefill=True,
    ),
    refused(
        "offloading with prefetch",
        "offloading with prefetch replaces the layers' forward",
        prefetching(prefetch=PrefetchOffloadConfig(offload_group_size=2)),
    ),
    refused(
        "decode kernels of whole layers",
        "kernels that decode whole layers leave out what is hooked behind them",
        additional_config={"steerserve": {}, "decode_backend": "latency_specialized"},
    ),
    refused(
        "speculation by a draft model",
        "only n-gram speculation leaves the drafts to the steered model",
        drafting,
    ),
    refused(
        "lossy acceptance of drafts",
        "accepts drafts that steering rules out",
        speculating(
            method="ngram",
            prompt_lookup_max=2,
            rejection_sample_method="synthetic",
            synthetic_acceptance_length=1.5,
        ),
    ),
    refused("pooling models", "the model does not generate", runner="pooling"),
    refused(
        "sleep mode on a GPU",
        "sleep mode may discard the rows",
        on_a_gpu,
        setting("model_config.enable_sleep_mode", True),
    ),
]
V1, V2 = RUNNERS
ONE_RUNNER = [
    (V1, (on_a_gpu,), "on a GPU only the V2 model runner is steered"),
    (V1, (setting("scheduler_config.async_scheduling", True),), "only without async scheduling"),
    (V2, (on_a_gpu, setting("model_config.enforce_eager", False)), "outside CUDA graphs"),
    (V2, (shared(pipeline_parallel_size=2), NGRAM), "cannot tell rejected drafts"),
]
RESIDENT = {"saes": [{"name": "a", "path": "/a", "resident": True}]}


@pytest.fixture(params=[V1, V2])
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return _choose(request.param, monkeypatch)


def _choose(runner: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(RUNNERS.index(runner)))
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    return runner


@pytest.mark.usefixtures("runner")
@pytest.mark.parametrize(("changes", "options", "reason"), CASES)
def test_what_cannot_be_exact_is_refused_with_its_reason(
    models: Callable[[str], Path], changes: tuple[Change, ...], options: dict[str, Any], reason: str
) -> None:
    check_engine(engine_config(models("llama")))
    config = engine_config(models("llama"), **options)
    for apply in changes:
        apply(config)
    with pytest.raises(IncompatibleError, match=reason):
        check_engine(config)


@pytest.mark.parametrize(("runner", "changes", "reason"), ONE_RUNNER)
def test_what_one_runner_cannot_do_exactly_is_refused_there(
    models: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    runner: str,
    changes: tuple[Change, ...],
    reason: str,
) -> None:
    _choose(runner, monkeypatch)
    config = engine_config(models("llama"), additional_config={"steerserve": RESIDENT})
    check_engine(config)
    for apply in changes:
        apply(config)
    with pytest.raises(IncompatibleError, match=reason):
        check_engine(config)


def test_decoding_by_one_kernel_is_refused_in_each_version_that_has_it(
    models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = engine_config(models("llama"))
    monkeypatch.setenv("VLLM_ROCM_MONO_DECODE", "1")
    with pytest.raises(IncompatibleError, match="decode whole layers"):
        check_engine(config)
    monkeypatch.delenv("VLLM_ROCM_MONO_DECODE")
    # Of 0.33 the setting itself is missing here, and is asked for: nothing is passed over.
    monkeypatch.setattr("vllm.__version__", "0.33.0")
    with pytest.raises(AttributeError, match="monokernel"):
        check_engine(config)
    monkeypatch.setattr(type(config.kernel_config), "monokernel", True, raising=False)
    with pytest.raises(IncompatibleError, match="decode whole layers"):
        check_engine(config)


@combination("encoder-decoder models", refused="encoder-decoder models have two streams")
def test_a_model_with_two_streams_is_refused(tmp_path: Path) -> None:
    whisper = write_config(tmp_path, "WhisperForConditionalGeneration", "whisper", d_model=64)
    with pytest.raises(IncompatibleError, match="encoder-decoder models have two streams"):
        check_engine(engine_config(whisper, skip_tokenizer_init=True))


@combination(
    "models that defer the all-reduce (TP > 1)", refused="its layers leave the all-reduce to the next norm"
)
def test_a_model_whose_layers_hand_on_partial_sums_is_refused_where_ranks_share_them(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "DeepseekV32ForCausalLM", "deepseek_v3", index_topk=8)
    config = engine_config(folder, skip_tokenizer_init=True)
    check_engine(config)
    parallel(config, tensor_parallel_size=2)
    with pytest.raises(IncompatibleError, match=r"DeepseekV32ForCausalLM.*leave the all-reduce"):
        check_engine(config)


class _Recorder:
    """Hands on what a real object has, and remembers what was asked of it."""

    def __init__(self, real: Any, asked: set[str]) -> None:
        self._real, self._asked = real, asked

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        owner = type(self._real)
        self._asked.add(f"{owner.__module__}:{owner.__name__}.{name}")
        return _Recorder(value, self._asked) if type(value).__module__.startswith("vllm.config") else value


def test_every_setting_that_is_read_stands_in_the_table(
    models: Callable[[str], Path], assets: dict[str, Any], tmp_path: Path
) -> None:
    sae = {"name": "jump", "path": str(assets["saes"]["jump"][0])}
    own = {"saes": [sae], "policies": str(tmp_path), "harvest": {"layer": 1}}
    config = engine_config(models("llama"), additional_config={"steerserve": own}, skip_tokenizer_init=True)
    NGRAM(config)
    asked: set[str] = set()
    recorded = _Recorder(config, asked)
    check_engine(recorded)
    list(refusals(recorded))
    assert catalog_for(recorded) is not None
    assert enforcement_for(recorded) is not None
    tables = [compat.SETTINGS, *compat.ONLY.values()]
    known = {f"{owner}.{name}" for table in tables for owner, names in table.items() for name in names}
    assert len(asked) > 30
    assert asked <= known


def test_no_refusal_reads_a_setting_that_may_be_missing() -> None:
    """With a default, what a version has renamed would be passed over in silence."""
    names = {
        node.id
        for node in ast.walk(ast.parse(inspect.getsource(refusals_module)))
        if isinstance(node, ast.Name)
    }
    assert not names & {"getattr", "hasattr", "suppress", "AttributeError"}


def test_the_table_in_the_docs_is_what_the_tests_say(tmp_path: Path) -> None:
    code = "from tests.support.combinations import page; print(page(), end='')"
    done = fork_server.run("-c", code, folder=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith(PAGE.read_text()), "write it again: python -m tests.support.combinations"
