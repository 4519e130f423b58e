"""What is tried to steer with: an SAE's features, and the directions that it is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from steerserve.sae import Hook

from .directions import make_directions
from .judged import Judged
from .labelled import Labelled, Prepared
from .outcomes import Candidate
from .texts import Text

__all__ = ["make_candidates", "typical_texts"]


def make_candidates(
    judged: Judged, hook: Hook, labelled: Labelled, data: Prepared, *, features: int, seed: int
) -> dict[str, list[Candidate]]:
    """For each label: its best detectors, a random feature, and the DiffMean and probe directions.

    Strength 1 is the largest activation (or projection) among the texts that chose.

    Args: features: how many detectors. seed: of the random feature.
    """
    diffmean = make_directions(data.choose, data.measure, hook, "diffmean")
    probe = make_directions(data.choose, data.measure, hook, "probe", data.probe)
    generator = torch.Generator().manual_seed(seed)
    rows = judged.decoder.cpu()
    out: dict[str, list[Candidate]] = {}
    for at, label in enumerate(data.choose.labels):
        chosen = [("sae", j) for j in labelled.candidates(at, features)]
        chosen.append(("random feature", labelled.random_feature(at, generator)))
        own = [Candidate(method, labelled.maxima[j] * rows[j], j) for method, j in chosen]
        for method, direction in (("diffmean", diffmean[at]), ("probe", probe[at])):
            own.append(Candidate(method, direction.statistics["max_activation"] * direction.vector))
        out[label] = own
    return out


def typical_texts(texts: Sequence[Text]) -> dict[str, str]:
    """For each label its text of median length, which the prompt method shows the model."""
    groups: dict[str, list[str]] = {}
    for text, label in texts:
        if label is not None:
            groups.setdefault(label, []).append(text)
    return {label: sorted(own, key=len)[len(own) // 2] for label, own in groups.items()}
