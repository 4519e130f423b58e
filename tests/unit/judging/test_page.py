from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from steerserve.judging.page import to_html
from steerserve.judging.report import _plain
from steerserve.judging.training_log import read_log

from .pages import Page

AXES = {"concept": 1.0, "instruct": 1.5, "fluency": 1.2, "overall": 1.1}
FOUND = {"f1": 0.5, "auroc": 0.9}


def sae(name: str, **changes: Any) -> dict[str, Any]:
    """A report's entry as small as it can be."""
    density = {"edges": [-2.0, -1.0, 0.0], "counts": [3, 1]}
    reconstruction = {"explained_variance": 0.9, "r2": 0.95, "l0": 12.0, "dead_fraction": 0.0}
    entry = {"name": name, "architecture": "topk", "d_in": 8, "d_sae": 4, "k": 2, "hook": "resid_post.1"}
    entry |= {"reconstruction": {**reconstruction, "dense_fraction": 0.25, "tokens": 100, "density": density}}
    entry |= dict.fromkeys(("model_loss", "known_features", "labelled", "steering"))
    return entry | {"training": []} | changes


def report(*saes: dict[str, Any]) -> dict[str, Any]:
    material = {"texts": 0, "labels": [], "shard_rows": 100, "prompts": 0, "concept_judge": "none"}
    return {"model": "models/tiny", "steerserve": "0", "material": material, "saes": list(saes)}


def steering(**overall: float) -> dict[str, Any]:
    methods = {name.replace("_", " "): {**AXES, "overall": value} for name, value in overall.items()}
    outcomes = [
        {
            "label": "food",
            "method": name,
            "strength": None,
            "feature": None,
            "axes": axes,
            "sample": ["He", "<b>"],
        }
        for name, axes in methods.items()
    ]
    lead = {
        name: {"mean": methods["sae"]["overall"] - one["overall"], "interval": 0.2}
        for name, one in methods.items()
    }
    strengths = [{"method": "sae", "strength": strength, **AXES} for strength in (0.5, 1.0)]
    del lead["sae"]
    return {"prompts": 3, "methods": methods, "sae_leads": lead, "strengths": strengths, "outcomes": outcomes}


def labelled() -> dict[str, Any]:
    concept = {"label": "food", "feature": 3, "latents": 1, "main": [3]}
    concept |= dict.fromkeys(("latent", "probe", "latent_text", "probe_text"), FOUND)
    concept |= {"absorption": {"fraction": 0.2, "full": 0.1, "tokens": 9}}
    ms = {"mean": None, "quartiles": [], "chance": 0.1, "features": 0}
    tpp = {"2": {"score": 0.1, "intended": 0.2, "unintended": 0.1}}
    return {"concepts": [concept], "tpp": tpp, "monosemanticity": ms}


def log(steps: int) -> list[dict[str, float]]:
    return [{"step": at, "loss": 1 / (at + 1), "l0": 12.0, "dead_share": 0.1} for at in range(steps)]


def test_a_page_fetches_nothing_and_closes_every_tag() -> None:
    known = {"mmcs": 0.9, "mcc": 0.8, "uniqueness": 0.7}
    loss = {"ce_score": 0.9, "kl_score": 0.9, "ce_clean": 1.0, "ce_sae": 1.1}
    whole = {"labelled": labelled(), "steering": steering(sae=1.0, prompt=1.5)}
    whole |= {"known_features": known, "model_loss": loss}
    html = to_html(report(sae("one", training=log(5), **whole), sae("two", **whole)))
    page = Page(html)
    assert page.open == []
    assert page.fetched == []
    assert page.tags.count("svg") == 3 + 2 * 3
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "http" not in html.replace("http://www.w3.org/", "")


def test_axes_of_plots_are_labelled_with_units() -> None:
    text = Page(to_html(report(sae("one", training=log(3), steering=steering(sae=1.0, prompt=0.5))))).text
    for label in (
        "firing rate [log₁₀ share of tokens]",
        "L0 [active features per token]",
        "explained variance (centred)",
        "training step",
        "score [0 to 2]",
        "fluency [0 to 2]",
    ):
        assert label in text


def test_a_page_says_where_the_sae_loses() -> None:
    loses = Page(to_html(report(sae("one", steering=steering(unsteered=1.9, sae=1.0, prompt=1.5))))).text
    assert "It loses to prompt by 0.50 ± 0.20." in loses
    close = Page(to_html(report(sae("one", steering=steering(sae=1.0, prompt=1.1))))).text
    assert "It loses to prompt by 0.10 ± 0.20, within the noise." in close
    wins = Page(to_html(report(sae("one", steering=steering(sae=1.0, diffmean=0.9))))).text
    assert "No control is ahead of it." in wins


def test_names_and_texts_are_escaped() -> None:
    html = to_html(report(sae("<script>alert(1)</script>", steering=steering(sae=1.0, prompt=0.5))))
    assert "<script>" not in html
    assert "&lt;b&gt;" in html


def test_without_a_training_log_there_are_no_curves() -> None:
    assert "Training" not in Page(to_html(report(sae("one")))).text
    assert "Training" in Page(to_html(report(sae("one", training=log(2))))).text


def test_the_page_is_the_same_in_every_run() -> None:
    assert to_html(report(sae("one", training=log(4)))) == to_html(report(sae("one", training=log(4))))


def test_numbers_that_are_none_are_null_in_json() -> None:
    plain = _plain({"a": math.nan, "b": [1 / 3, math.inf], "c": ("x", 2, None)})
    assert json.loads(json.dumps(plain)) == {"a": None, "b": [0.333333, None], "c": ["x", 2, None]}


@pytest.mark.parametrize("text", ["", "not json\n", '{"loss": 1}\n', "[1, 2]\n"])
def test_a_training_log_without_steps_is_empty(text: str, tmp_path: Path) -> None:
    (tmp_path / "training.jsonl").write_text(text)
    assert read_log(tmp_path / "training.jsonl") == []
    assert read_log(tmp_path / "none.jsonl") == []


def test_a_log_that_a_crash_cut_off_is_read_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "training.jsonl"
    path.write_text('{"step": 1, "loss": 0.5, "sae": "x", "l0": NaN}\n{"step": 2, "lo')
    assert read_log(path) == [{"step": 1.0, "loss": 0.5}]
