"""Cards: for each domain the features that stand for it, how well, and how to steer with them.

python -m demo.build --from cards
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from demo.choose import Clamp, choose_ablations, choose_clamps
from demo.corpus.sentences import DOMAINS
from demo.detectors import Detectors, judge
from demo.steer import Steered
from steerserve.errors import CheckpointError
from steerserve.sae import Label, open_sae, write_manifest
from steerserve.sae.files import sha256_of
from steerserve.sae.manifest import ModelEntry
from steerserve.training.shards import ShardReader

__all__ = ["FEATURES", "make_cards", "read_cards"]

FEATURES = "features.json"
# Further features of a domain that get a label ("music/2"), best detectors first.
MORE = 4
LEAST_F1 = 0.2


def make_cards(demo: Path, shards: Path, seed: int, held_out: int) -> None:
    """Write `features.json` into `demo` and the labels into the manifest of `demo/sae`.

    Args: shards: a harvest of `labelled_documents(seed, …)`. held_out: its last tokens, not trained on.
    """
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    detectors = judge(open_sae(demo / "sae"), ShardReader(shards), tokenizer, seed, held_out)
    with Steered(demo / "model", demo / "sae") as steered:
        clamps = choose_clamps(steered, detectors)
        ablations = choose_ablations(steered, detectors)
    cards = {domain: _card(detectors, domain, clamps[domain], ablations[domain]) for domain in DOMAINS}
    (demo / FEATURES).write_text(json.dumps(cards, indent=1) + "\n", encoding="utf-8")
    _label(demo, cards)


def read_cards(demo: Path) -> dict[str, dict[str, Any]]:
    """The cards by domain, as `features.json` has them."""
    cards: dict[str, dict[str, Any]] = json.loads((demo / FEATURES).read_text(encoding="utf-8"))
    return cards


def _card(detectors: Detectors, domain: str, clamp: Clamp, ablate: list[int]) -> dict[str, Any]:
    ranked = [
        feature
        for feature in detectors.best(domain, MORE + 1)
        if feature != clamp.feature and detectors.score(feature, domain).f1 >= LEAST_F1
    ]
    features = [
        {"feature": feature, "label": domain if place == 1 else f"{domain}/{place}"}
        | asdict(detectors.score(feature, domain))
        for place, feature in enumerate([clamp.feature, *ranked[:MORE]], 1)
    ]
    return {
        "feature": clamp.feature,
        "clamp": {"value": clamp.value, "unit": "max"},
        "ablate": ablate,
        "features": features,
    }


def _label(demo: Path, cards: dict[str, dict[str, Any]]) -> None:
    """Write the cards' features into the manifest, and which model they are of."""
    sae = open_sae(demo / "sae")
    if sae.manifest is None:
        raise CheckpointError("expected a manifest beside the demo's SAE", path=sae.path)
    labels = [
        Label(
            feature=item["feature"],
            label=item["label"],
            domain=domain,
            f1=item["f1"],
            precision=item["precision"],
            recall=item["recall"],
        )
        for domain, card in cards.items()
        for item in card["features"]
    ]
    model = ModelEntry(name=sae.manifest.model.name, sha256=sha256_of(demo / "model" / "model.safetensors"))
    write_manifest(demo / "sae", sae.manifest.model_copy(update={"labels": labels, "model": model}))
