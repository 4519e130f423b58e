"""Two data-parallel replicas behind one front end: each steers its own requests, the report holds both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steerserve.report import merge_workers
from tests.support.combinations import RUNNERS, combination
from tests.support.engine import engine_settings, random_prompts
from tests.support.forking import INTERPRETER
from tests.support.reference import Reference
from tests.support.replicas import TICKET
from tests.support.times import starting

PLAN: list[dict[str, Any]] = [{"sae": "jump", "feature": 3, "op": "clamp", "value": 4.0}]
REQUESTS = 8


@pytest.mark.slow
@combination("data parallelism (DP = 2)")
@pytest.mark.parametrize("runner", RUNNERS)
def test_every_replica_steers_and_the_report_holds_all_of_them(
    runner: str, models: Callable[[str], Path], assets: dict[str, Any]
) -> None:
    prompts = random_prompts(REQUESTS, [10, 40, 70], seed=51)
    # Requests go to the replicas in turns: two steered, two not.
    plans = [PLAN if i % 4 < 2 else [] for i in range(REQUESTS)]
    answer = _serve(runner, models("llama"), assets, prompts, plans)
    reference = Reference(models("llama"), assets["saes"], assets["directions"])
    for prompt, plan, reply in zip(prompts, plans, answer["replies"], strict=True):
        expected = reference.logprobs(prompt, reply["tokens"], plan)
        assert reply["logprobs"] == pytest.approx(expected.tolist(), abs=1e-3)
    assert {reply["dp_rank"] for reply in answer["counted"] if reply["tokens"]} == {0, 1}
    assert merge_workers(answer["counted"]).tallies[TICKET].requests == REQUESTS // 2


def _serve(
    runner: str, model: Path, assets: dict[str, Any], prompts: list[list[int]], plans: list[Any]
) -> dict[str, Any]:
    settings = {**engine_settings(assets), "data_parallel_size": 2}
    steering = [{"interventions": plan} if plan else None for plan in plans]
    asked = {"model": str(model), "settings": settings, "prompts": prompts, "steering": steering}
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    if runner == "v2":
        environment |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "PYTHONPATH": str(INTERPRETER)}
    command = [sys.executable, "-m", "tests.support.replicas"]
    with starting():
        done = subprocess.run(
            command,
            input=json.dumps(asked),
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer
