"""The demo's insult features under a policy: no token of hostile requests has them behind the hook."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams

from demo.prompts import DOMAIN_PROMPTS, NEUTRAL_PROMPTS
from steerserve.sae import open_sae
from steerserve_vllm.harvester import stop_engine
from tests.support.one import OneAtATime
from tests.support.scale import REST, amount, scaled
from tests.support.times import starting

DEMO = Path(__file__).parents[2] / "sae_weights" / "demo"
CARD = json.loads((DEMO / "features.json").read_text())["insult"]
HELD = sorted({*CARD["ablate"], *(item["feature"] for item in CARD["features"])})
REQUESTS = amount(500, 150, "ATTACK_REQUESTS")
# As long as it may take to look at the folder again, twice.
SETTLED = 1.5
EVERYWHERE = {"special_tokens": True}


@pytest.fixture(scope="module")
def llm(running: OneAtATime, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return running.get("demo policy", lambda: start(tmp_path_factory.mktemp("policies")))


@contextmanager
def start(folder: Path) -> Iterator[LLM]:
    entries = [{"sae": "demo", "feature": f, "op": "ablate", "where": EVERYWHERE} for f in HELD]
    head = {"name": "no-insults", "version": 1, "mode": "enforce", "owner": "o", "reason": "r"}
    (folder / "no-insults.yaml").write_text(json.dumps({**head, "interventions": entries}))
    saes = [{"name": name, "path": str(DEMO / "sae")} for name in ("demo", "twin")]
    with starting():
        llm = LLM(
            str(DEMO / "model"),
            additional_config={"steerserve": {"saes": saes, "policies": str(folder)}},
            worker_extension_cls="tests.support.observer.Observer",
            max_model_len=256,
            max_num_seqs=64,
            enforce_eager=True,
            gpu_memory_utilization=0.2,
        )
    yield llm
    stop_engine(llm)


def hostile(rng: random.Random, d_sae: int) -> dict[str, Any] | None:
    """Mostly huge edits of other features, and of the held ones under another name of the same weights."""
    if rng.random() < 0.2:
        return None
    places = {(rng.choice(("demo", "twin")), rng.randrange(d_sae)) for _ in range(rng.randint(1, 12))}
    places |= {("twin", rng.choice(HELD)) for _ in range(rng.randint(0, 4))}
    changes = []
    for sae, feature in sorted(places - {("demo", f) for f in HELD}):
        value = rng.choice((-1e6, -40.0, 1.0, 40.0, 1e6))
        change = {
            "sae": sae,
            "feature": feature,
            "op": rng.choice(("clamp", "add", "scale", "at_least")),
            "value": value,
        }
        if rng.random() < 0.3:
            change["when"] = {"feature": rng.choice(HELD), "above": 0.0}
            change["latch"] = rng.random() < 0.5
        changes.append(change)
    return {"interventions": changes} if changes else None


@scaled
def test_no_token_has_an_insult_feature_behind_the_hook(llm: LLM) -> None:
    sae = open_sae(DEMO / "sae")
    assert sae.hook is not None
    llm.collective_rpc("attack_observe", args=(str(DEMO / "sae"), HELD, sae.hook.layer))
    rng = random.Random(3 + REST)
    prompts = [
        *NEUTRAL_PROMPTS,
        *(prompt for own in DOMAIN_PROMPTS.values() for prompt in own),
        *DOMAIN_PROMPTS["insult"] * 6,
    ]
    asked = [(rng.choice(prompts), hostile(rng, sae.d_sae)) for _ in range(REQUESTS)]
    params = [
        SamplingParams(
            max_tokens=24, temperature=0.8, seed=i, extra_args=None if s is None else {"steering": s}
        )
        for i, (_, s) in enumerate(asked)
    ]
    outputs = llm.generate([prompt for prompt, _ in asked], params, use_tqdm=False)
    seen = llm.collective_rpc("attack_observed")[0]
    assert {output.outputs[0].finish_reason for output in outputs} <= {"length", "stop"}
    assert seen["tokens"] > 10 * REQUESTS
    assert seen["fired_before"] > seen["tokens"] // 20
    assert (seen["fired_behind"], seen["exact"], seen["rounded"]) == (0, 0.0, 0.0), seen


@pytest.mark.parametrize("feature", [HELD[0], "insult"])
def test_naming_one_of_them_is_refused(llm: LLM, feature: int | str) -> None:
    change = {"sae": "demo", "feature": feature, "op": "clamp", "value": 9.0}
    params = SamplingParams(max_tokens=1, extra_args={"steering": {"interventions": [change]}})
    with pytest.raises(VLLMValidationError, match="which policy `no-insults` holds"):
        llm.generate(["You"], params, use_tqdm=False)


def test_beams_are_refused_while_a_policy_depends_on_positions(llm: LLM) -> None:
    """Offline as over HTTP: each token of a beam is a prompt of its own to the engine."""
    prompts, params = [{"prompt": "You"}], BeamSearchParams(beam_width=2, max_tokens=2)
    assert len(llm.beam_search(prompts, params)[0].sequences) == 2
    late = Path(llm.llm_engine.vllm_config.additional_config["steerserve"]["policies"]) / "late.yaml"
    entry = {"sae": "demo", "feature": min({*range(99)} - {*HELD}), "op": "ablate", "where": {"start": 4}}
    head = {"name": "late", "version": 1, "mode": "enforce", "owner": "o", "reason": "r"}
    late.write_text(json.dumps({**head, "interventions": [entry]}))
    try:
        time.sleep(SETTLED)
        with pytest.raises(VLLMValidationError, match="depends on positions"):
            llm.beam_search(prompts, params)
        assert not llm.llm_engine.has_unfinished_requests()
    finally:
        late.unlink()
    time.sleep(SETTLED)
    assert len(llm.beam_search(prompts, params)[0].sequences) == 2
