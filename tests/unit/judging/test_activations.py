from __future__ import annotations

import pytest
import torch

from steerserve.judging.activations import SparseActivations
from steerserve.judging.judged import Judged
from steerserve.training.evaluate import DetectorCounts


@pytest.fixture(params=["jumprelu", "topk", "layer_norm"])
def judged(request: pytest.FixtureRequest, saes: dict[str, Judged]) -> Judged:
    return saes[request.param]


def test_sparse_activations_hold_what_the_sae_encodes(judged: Judged, stream: torch.Tensor) -> None:
    told: list[int] = []
    found = SparseActivations.of(judged, stream, told.append)
    encoded = judged.encode(stream)
    assert sum(told) == len(stream)
    torch.testing.assert_close(found.maxima(), encoded.f.amax(0))
    torch.testing.assert_close(found.columns([7, 0, 99]), encoded.f[:, [7, 0, 99]])
    tokens = torch.tensor([5, 3, 41])
    torch.testing.assert_close(found.dense(tokens), (encoded.gain.unsqueeze(1) * encoded.f)[tokens])


def test_pooling_is_by_group_whatever_the_order_of_tokens(judged: Judged, stream: torch.Tensor) -> None:
    group = torch.randint(4, (len(stream),), generator=torch.Generator().manual_seed(0))
    found, encoded = SparseActivations.of(judged, stream), judged.encode(stream)
    weighted = encoded.gain.unsqueeze(1) * encoded.f
    mean = torch.stack([weighted[group == at].mean(0) for at in range(4)])
    largest = torch.stack([encoded.f[group == at].amax(0) for at in range(4)])
    torch.testing.assert_close(found.pooled_mean(group, 4), mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.pooled_max(group, 4), largest)


def test_detectors_are_scored_as_the_trainer_scores_them(judged: Judged, stream: torch.Tensor) -> None:
    label = torch.arange(len(stream)) % 3
    f = judged.encode(stream).f
    threshold = f.amax(0) * 0.2
    counts = DetectorCounts(judged.d_sae, 3)
    counts.update(f - threshold, torch.nn.functional.one_hot(label, 3).bool())
    found = SparseActivations.of(judged, stream).detector_f1(label, 3, threshold)
    torch.testing.assert_close(found, counts.scores()[2])
