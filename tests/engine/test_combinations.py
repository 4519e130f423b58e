"""What cannot be steered exactly is refused at start-up; the table in the docs says what the tests say."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from steerserve.errors import IncompatibleError
from steerserve_vllm.setup import check_engine
from tests.support import fork_server
from tests.support.combinations import PAGE, combination

GPU = {"device_config.device_type": "cuda"}
V2 = {"use_v2_model_runner": True}
SPECULATION = "speculative_config"


def refused(feature: str, reason: str, *changes: dict[str, Any]) -> Any:
    """A case: this reason is given, on the runner that the changes choose."""
    joined = {key: value for change in changes for key, value in change.items()}
    return pytest.param(joined, reason, marks=combination(feature, refused=reason), id=feature)


CASES = [
    refused("KV connector", "a KV connector keys blocks without the plan", {"kv_transfer_config": object()}),
    refused(
        "sequence parallelism",
        "sequence parallelism splits the stream between ranks",
        {"compilation_config.pass_config.enable_sp": True},
    ),
    refused(
        "context parallelism",
        "context parallelism splits a request's tokens",
        {"parallel_config.decode_context_parallel_size": 2},
    ),
    refused(
        "micro-batching (DBO)",
        "micro-batching splits a step's tokens",
        {"parallel_config.use_ubatching": True},
    ),
    refused(
        "speculation by a draft model",
        "only n-gram speculation leaves the drafts to the steered model",
        {SPECULATION: SimpleNamespace(method="eagle")},
    ),
    refused(
        "encoder-decoder models",
        "encoder-decoder models have two streams",
        {"model_config.is_encoder_decoder": True},
    ),
    refused("pooling models", "the model does not generate", {"model_config.runner_type": "pooling"}),
    refused(
        "sleep mode on a GPU",
        "sleep mode may discard the rows",
        GPU,
        V2,
        {"model_config.enable_sleep_mode": True},
    ),
]
ONE_RUNNER = [
    (GPU, "on a GPU only the V2 model runner is steered"),
    ({"scheduler_config.async_scheduling": True}, "only without async scheduling"),
    ({**GPU, **V2, "resident": True}, "outside CUDA graphs"),
    (
        {**V2, SPECULATION: SimpleNamespace(method="ngram"), "parallel_config.pipeline_parallel_size": 2},
        "cannot tell rejected drafts",
    ),
]


@pytest.mark.parametrize(("changes", "reason"), CASES)
def test_what_cannot_be_exact_is_refused_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    check_engine(_engine({}))
    with pytest.raises(IncompatibleError, match=reason):
        check_engine(_engine(changes))


@pytest.mark.parametrize(("changes", "reason"), ONE_RUNNER)
def test_what_one_runner_cannot_do_exactly_is_refused_there(changes: dict[str, Any], reason: str) -> None:
    check_engine(_engine(V2))
    with pytest.raises(IncompatibleError, match=reason):
        check_engine(_engine(changes))


def test_the_table_in_the_docs_is_what_the_tests_say(tmp_path: Path) -> None:
    code = "from tests.support.combinations import page; print(page(), end='')"
    done = fork_server.run("-c", code, folder=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith(PAGE.read_text()), "write it again: python -m tests.support.combinations"


def _engine(changes: dict[str, Any]) -> Any:
    """What `check_engine` reads of vLLM's configuration; `changes` by dotted name."""
    config = SimpleNamespace(
        additional_config={"steerserve": {}},
        model_config=SimpleNamespace(
            runner_type="generate", is_encoder_decoder=False, enforce_eager=False, enable_sleep_mode=False
        ),
        parallel_config=SimpleNamespace(
            use_ubatching=False,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            pipeline_parallel_size=1,
        ),
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace(enable_sp=False)),
        scheduler_config=SimpleNamespace(async_scheduling=False),
        device_config=SimpleNamespace(device_type="cpu"),
        kv_transfer_config=None,
        speculative_config=None,
        use_v2_model_runner=False,
    )
    for name, value in changes.items():
        if name == "resident":
            sae = {"name": "a", "path": "/a", "resident": value}
            config.additional_config = {"steerserve": {"saes": [sae]}}
            continue
        *owners, attribute = name.split(".")
        owner: Any = config
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, attribute, value)
    return config
