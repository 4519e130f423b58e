from __future__ import annotations

import pytest
import torch

from steerserve.judging.judged import Judged
from steerserve.judging.probe import LinearProbe
from steerserve.judging.tpp import judge_tpp


def test_planted_features_blind_their_own_probe_and_no_other() -> None:
    label = torch.arange(30) % 3
    f = torch.zeros(30, 6)
    f[torch.arange(30), label] = 1.0
    f[torch.arange(30), label + 3] = 0.5
    decoder = torch.cat([torch.eye(3), torch.eye(3)])
    probe = LinearProbe(torch.eye(3), torch.full((3,), -0.25))
    found = judge_tpp((f, label), (f, f @ decoder, label), decoder, probe, sizes=(1, 2))
    # One latent leaves the other half of the concept behind, which still shows; two take all of it.
    assert (found[1].intended, found[1].unintended) == (0.0, 0.0)
    assert (found[2].intended, found[2].unintended, found[2].score) == (0.5, 0.0, 0.5)


def test_ablating_pooled_activations_is_ablating_every_token(
    saes: dict[str, Judged], stream: torch.Tensor
) -> None:
    """As SAEBench does it: decode without the latents, add the error, then take each text's mean."""
    judged, text, label = saes["layer_norm"], torch.arange(60) // 6, torch.arange(10) % 2
    encoded = judged.encode(stream)
    weighted = encoded.gain.unsqueeze(1) * encoded.f
    probe = LinearProbe(torch.randn(2, 64, generator=torch.Generator().manual_seed(2)), torch.zeros(2))

    def pooled(rows: torch.Tensor) -> torch.Tensor:
        return torch.stack([rows[text == at].mean(0) for at in range(10)])

    def accuracy(x: torch.Tensor) -> torch.Tensor:
        says = probe.scores(x) > 0
        sides = [[(says[label == c, p] == (c == p)).double().mean() for c in (0, 1)] for p in (0, 1)]
        return torch.tensor([sum(side) / 2 for side in sides])

    f = pooled(weighted)
    found = judge_tpp((f, label), (f, pooled(stream), label), judged.decoder, probe, sizes=(20,))
    own, other = [], []
    for at in (0, 1):
        difference = (f[label == at].mean(0) - f[label != at].mean(0)).clamp(min=0)
        chosen = (difference * (judged.decoder @ probe.weight[at])).topk(20).indices
        edited = encoded.f.clone()
        edited[:, chosen] = 0
        error = stream - judged.resident.decode(encoded.f, encoded)
        fall = accuracy(pooled(stream)) - accuracy(pooled(judged.resident.decode(edited, encoded) + error))
        own.append(float(fall[at]))
        other.append(float(fall[1 - at]))
    assert found[20].intended == pytest.approx(sum(own) / 2)
    assert found[20].unintended == pytest.approx(sum(other) / 2)
