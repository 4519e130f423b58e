from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from scipy.stats import ttest_1samp

from steerserve.errors import ConfigError
from steerserve.judging.hooked import HookedModel
from steerserve.judging.outcomes import Candidate, Lead, SteeringSettings
from steerserve.judging.steering import judge_steering
from tests.support.models import D_MODEL

from .conftest import WORDS

SETTINGS = SteeringSettings(strengths=(0.5, 4.0), tokens=5, temperature=0)
PROMPTS = [*WORDS, "w90 w91"]


def unit(seed: int) -> torch.Tensor:
    vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))
    return 3 * vector / vector.norm()


def texts_under(model: HookedModel, vector: torch.Tensor | None, prompts: Sequence[str]) -> set[str]:
    from steerserve.judging.generation import Request, continuations

    rows = [Request(model.encode(prompt, 99), vector) for prompt in prompts]
    found = continuations(model, rows, tokens=5, temperature=0, seed=0)
    return {model.tokenizer.decode(row) for row in found}


def test_the_strength_that_works_on_some_prompts_is_measured_on_the_others(model: HookedModel) -> None:
    """The judge knows the texts that the planted candidate brings about at one strength, on any prompt."""
    right, wrong = Candidate("sae", unit(0), 7), Candidate("sae", unit(1), 8)
    wanted = texts_under(model, 4.0 * right.unit, PROMPTS)
    asked: list[str] = []

    def judge(texts: Sequence[str], label: str) -> list[float]:
        asked.append(label)
        return [2.0 if text in wanted else 0.0 for text in texts]

    candidates = {"up": [right, wrong, Candidate("diffmean", unit(2))]}
    found = judge_steering(model, PROMPTS, candidates, {"up": "w100"}, judge, SETTINGS)
    by_method = {outcome.method: outcome for outcome in found.outcomes}
    assert list(by_method) == ["unsteered", "prompt", "sae", "diffmean", "wrong sign"]
    assert (by_method["sae"].feature, by_method["sae"].strength) == (7, 4.0)
    assert by_method["sae"].axes.concept == 2.0
    assert by_method["unsteered"].axes.concept == 0.0
    assert (by_method["wrong sign"].feature, by_method["wrong sign"].axes.concept) == (7, 0.0)
    assert set(asked) == {"up"}
    assert found.prompts == 2
    assert by_method["sae"].sample[0] == PROMPTS[1]
    assert set(found.trials) == {(m, s) for m in ("sae", "diffmean") for s in SETTINGS.strengths}


def test_unsteered_text_has_the_means_of_its_own_baseline(model: HookedModel) -> None:
    candidates = {"up": [Candidate("sae", unit(0), 7)], "down": [Candidate("sae", unit(1), 8)]}
    found = judge_steering(
        model,
        ["w5 w9"] * 4,
        candidates,
        {"up": "w7", "down": "w8"},
        lambda texts, _: [2.0] * len(texts),
        SETTINGS,
    )
    plain = [outcome.axes for outcome in found.outcomes if outcome.method == "unsteered"]
    assert len(plain) == 2
    assert plain[0].overall == pytest.approx(2.0)
    assert set(found.by_method()) == {"unsteered", "prompt", "sae", "wrong sign"}
    scores = {(one.method, one.label): one.axes.overall for one in found.outcomes}
    gaps = [scores["sae", label] - scores["prompt", label] for label in ("up", "down")]
    assert found.leads()["prompt"].mean == pytest.approx(sum(gaps) / 2)


def test_a_lead_is_a_paired_t_interval() -> None:
    differences = [0.1, 0.3, -0.2, 0.5, 0.0]
    found = Lead.of(differences)
    interval = ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (found.mean - found.interval, found.mean + found.interval) == pytest.approx(tuple(interval))
    assert Lead.of([0.4]).mean == 0.4


def test_one_prompt_cannot_both_choose_and_measure(model: HookedModel) -> None:
    with pytest.raises(ConfigError, match="at least two prompts"):
        judge_steering(model, ["w5"], {}, {}, lambda texts, _: [0.0] * len(texts))
