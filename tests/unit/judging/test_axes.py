from __future__ import annotations

import math

import pytest

from steerserve.judging.axes import Axes, Baseline, Reading, mean_axes, read, score
from steerserve.judging.generation import nats
from steerserve.judging.hooked import HookedModel

BASELINE = Baseline(surprise=2.0, pmi=0.5, distinct=0.9)


def axes(concept: float, **changes: float) -> Axes:
    usual = {"surprise": 2.0, "pmi": 0.5, "distinct": 0.9}
    reading = Reading(**{**usual, **changes}, text="words")
    (found,) = score([reading], BASELINE, lambda texts, label: [concept], "food")
    return found


def test_text_like_the_unsteered_models_scores_full_marks() -> None:
    found = axes(2.0)
    assert (found.concept, found.instruct, found.fluency, found.overall) == (2.0, 2.0, 2.0, 2.0)


def test_fluency_falls_with_perplexity_and_with_repetition() -> None:
    assert axes(2.0, surprise=2.0 + math.log(4)).fluency == pytest.approx(0.5)
    assert axes(2.0, surprise=0.1).fluency == 2.0
    assert axes(2.0, surprise=0.1, distinct=0.09).fluency == pytest.approx(0.2)


def test_instruct_is_what_the_prompt_foretells() -> None:
    assert axes(2.0, pmi=0.125).instruct == pytest.approx(0.5)
    assert axes(2.0, pmi=-1.0).instruct == 0.0
    assert axes(2.0, pmi=3.0).instruct == 2.0


def test_the_overall_score_is_the_harmonic_mean_and_zero_if_one_is() -> None:
    assert Axes.of(2.0, 1.0, 0.5).overall == pytest.approx(3 / (0.5 + 1 + 2))
    assert Axes.of(2.0, 2.0, 0.0).overall == 0.0
    assert mean_axes([Axes.of(2.0, 2.0, 2.0), Axes.of(0.0, 2.0, 1.0)]) == Axes(1.0, 2.0, 1.5, 1.0)


def test_an_empty_continuation_scores_nothing() -> None:
    assert axes(2.0, surprise=math.nan) == Axes(0.0, 0.0, 0.0, 0.0)


def test_readings_are_made_by_the_unsteered_model(model: HookedModel) -> None:
    prompt, told = model.encode("w5 w9", 99), [30, 8, 30, 8]
    (found,) = read(model, [prompt], [told])
    behind, alone = nats(model, [(prompt, told), ([0], told)])
    assert (found.surprise, found.pmi) == pytest.approx((behind, alone - behind))
    assert found.distinct == pytest.approx(2 / 3)
    assert found.text == "w30 w8 w30 w8"
    assert Baseline.of([found]).surprise == found.surprise
