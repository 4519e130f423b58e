from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steerserve.judging.absorption import judge_absorption


def by_the_book(f: Tensor, x: Tensor, decoder: Tensor, probe: Tensor, main: list[int]) -> tuple[float, bool]:
    """SAEBench's definition for one token, step by step in plain numbers."""
    p = probe / probe.norm()
    cosines = [float(row @ p / row.norm()) for row in decoder]
    carried = [float(f[j] * (decoder[j] @ p)) for j in range(len(f))]
    whole, by_main = float(x @ p), sum(carried[j] for j in main)
    others = [carried[j] for j in range(len(f)) if j not in main and cosines[j] >= 0.1 and carried[j] > 0]
    absorbed = sum(sorted(others)[-3:])
    if by_main >= whole or absorbed / whole < 0.4:
        fraction = 0.0
    elif by_main <= 0:
        fraction = 1.0
    else:
        share = min(absorbed, whole - by_main)
        fraction = share / (share + by_main)
    strongest = max(range(len(f)), key=lambda j: carried[j])
    silent = all(float(f[j]) == 0 for j in main)
    full = silent and cosines[strongest] >= 0.025 and whole >= 0 and carried[strongest] / whole >= 0.4
    return fraction, full


def test_absorption_is_saebenchs_definition_token_by_token() -> None:
    generator = torch.Generator().manual_seed(0)
    decoder = torch.randn(12, 5, generator=generator)
    f = torch.rand(200, 12, generator=generator) * (torch.rand(200, 12, generator=generator) < 0.4)
    x = f @ decoder + 0.3 * torch.randn(200, 5, generator=generator)
    probe, main = torch.randn(5, generator=generator), [2, 7]
    expected = [by_the_book(f[at], x[at], decoder, probe, main) for at in range(200)]
    found = judge_absorption(f, x, decoder, probe, main)
    assert found.fraction == pytest.approx(sum(fraction for fraction, _ in expected) / 200, abs=1e-6)
    assert found.full == pytest.approx(sum(full for _, full in expected) / 200)
    assert 0 < found.full < 1
    assert 0 < found.fraction < 1


def test_a_planted_absorbing_latent_is_found() -> None:
    # Latent 1 speaks for the concept on half of the tokens, and brings its own direction along.
    decoder = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    f = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.25, 1.0]]).repeat(5, 1)
    found = judge_absorption(f, f @ decoder, decoder, torch.tensor([2.0, 0.0, 0.0]), [0])
    assert (found.fraction, found.full, found.tokens) == (0.5, 0.5, 10)


def test_no_tokens_are_no_absorption() -> None:
    none = judge_absorption(torch.zeros(0, 3), torch.zeros(0, 3), torch.eye(3), torch.ones(3), [0])
    assert (none.fraction, none.full, none.tokens) == (0.0, 0.0, 0)
