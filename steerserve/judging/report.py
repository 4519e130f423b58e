"""A judgement as plain JSON: what the page shows, and more."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import steerserve

from .labelled import Labelled
from .outcomes import Steering
from .verdict import Judgement, Verdict

__all__ = ["to_json"]

_DIGITS = 6


def to_json(judgement: Judgement) -> dict[str, Any]:
    """Everything that was found, with NaN as null and six significant digits."""
    classifier = judgement.classifier
    report = {
        "format": 1,
        "steerserve": steerserve.__version__,
        "model": judgement.model,
        "settings": judgement.settings.model_dump(),
        "material": judgement.facts,
        "text_classifier_accuracy": None if classifier is None else classifier.accuracy,
        "saes": [_verdict(verdict) for verdict in judgement.verdicts],
    }
    plain: dict[str, Any] = _plain(report)
    return plain


def _verdict(verdict: Verdict) -> dict[str, Any]:
    judged, found = verdict.judged, verdict.reconstruction
    spliced = verdict.spliced
    return {
        "name": judged.name,
        "architecture": judged.sae.architecture,
        "d_in": judged.d_in,
        "d_sae": judged.d_sae,
        "k": judged.sae.top_k,
        "hook": f"{verdict.hook.site}.{verdict.hook.layer}" if verdict.hook else None,
        "reconstruction": {
            **found.evaluation.numbers(),
            "dense_fraction": found.dense_share,
            "tokens": found.evaluation.tokens,
            "density": asdict(found.histogram),
        },
        "model_loss": None
        if spliced is None
        else {"ce_score": spliced.ce_score, "kl_score": spliced.kl_score, **asdict(spliced)},
        "known_features": None if verdict.recovery is None else asdict(verdict.recovery),
        "labelled": None if verdict.labelled is None else _labelled(verdict.labelled),
        "steering": None if verdict.steering is None else _steering(verdict.steering),
        "training": verdict.training,
    }


def _labelled(found: Labelled) -> dict[str, Any]:
    scores = found.monosemanticity
    alive = scores[~scores.isnan()]
    return {
        "concepts": [
            {**asdict(concept), "absorption": asdict(absorption)}
            for concept, absorption in zip(found.concepts, found.absorption, strict=True)
        ],
        "tpp": {str(size): {"score": one.score, **asdict(one)} for size, one in found.tpp.items()},
        "monosemanticity": {
            "mean": float(alive.mean()) if len(alive) else math.nan,
            "quartiles": alive.quantile(alive.new_tensor([0.25, 0.5, 0.75])).tolist() if len(alive) else [],
            "chance": found.similarity,
            "features": len(alive),
        },
    }


def _steering(found: Steering) -> dict[str, Any]:
    return {
        "prompts": found.prompts,
        "unsteered_text": asdict(found.baseline),
        "methods": {name: asdict(axes) for name, axes in found.by_method().items()},
        "sae_leads": {name: asdict(lead) for name, lead in found.leads().items()},
        "strengths": [
            {"method": method, "strength": strength, **asdict(axes)}
            for (method, strength), axes in found.trials.items()
        ],
        "outcomes": [asdict(outcome) for outcome in found.outcomes],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value
