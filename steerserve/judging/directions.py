"""Directions made from labelled texts: the difference of means, and a linear probe's normal."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from steerserve.sae import Direction, Hook

from .probe import LinearProbe, fit_probes
from .scores import auroc
from .texts import TokenTable

__all__ = ["Method", "diffmean", "make_directions"]

Method = Literal["diffmean", "probe"]


def diffmean(x: Tensor, inside: Tensor) -> Tensor:
    """[d] float64: the mean of x inside a concept less the mean outside.

    Args: x: [n, d]. inside: [n] bool, with both values present.
    Source: Marks and Tegmark 2023, arXiv:2310.06824; AxBench (arXiv:2501.17148) calls it DiffMean.
    """
    wide = x.double()
    return wide[inside].mean(0) - wide[~inside].mean(0)


def make_directions(
    choose: TokenTable, measure: TokenTable, hook: Hook, method: Method, probe: LinearProbe | None = None
) -> list[Direction]:
    """One direction for each label, as the server serves it.

    Its `statistics` are of the projection x·v in the model's own scale: `max_activation` (what "unit": "max"
    counts in), `mean_inside` and `mean_outside` on the texts it was made from; `auroc` by token and
    `auroc_texts` by text mean, on the others.

    Args: probe: of `choose`, where it was fitted already.
    """
    if method == "probe":
        vectors = (probe or fit_probes(choose.x, choose.truth())).weight.double()
    else:
        vectors = torch.stack([diffmean(choose.x, choose.label == at) for at in range(len(choose.labels))])
    units = (vectors / vectors.norm(dim=1, keepdim=True)).float()
    return [
        Direction(label, units[at], hook, _statistics(units[at], at, choose, measure))
        for at, label in enumerate(choose.labels)
    ]


def _statistics(unit: Tensor, at: int, choose: TokenTable, measure: TokenTable) -> dict[str, float]:
    along, inside = choose.x @ unit, choose.label == at
    return {
        "max_activation": float(along.max()),
        "mean_inside": float(along[inside].mean()),
        "mean_outside": float(along[~inside].mean()),
        "auroc": auroc(measure.x @ unit, measure.label == at),
        "auroc_texts": auroc(measure.pooled() @ unit, measure.text_label() == at),
    }
