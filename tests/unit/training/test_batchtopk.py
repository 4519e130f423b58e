from __future__ import annotations

import pytest
import torch

from steerserve.training.batchtopk import Parameters, dense_loss, sparse_step
from steerserve.training.codes import batch_top_k

B, D, F, K = 64, 16, 96, 6


def _parameters() -> Parameters:
    generator = torch.Generator().manual_seed(0)
    decoder = torch.nn.functional.normalize(torch.randn(F, D, generator=generator), dim=-1)
    encoder = decoder + 0.1 * torch.randn(F, D, generator=generator)
    bias, b_dec = (0.1 * torch.randn(size, generator=generator) for size in (F, D))
    return Parameters(encoder, bias, decoder, b_dec)


def _batch() -> torch.Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dead_count", [0, 1, 5, D // 2, 40, F])
def test_sparse_gradients_equal_dense_autograd(dead_count: int) -> None:
    dead = torch.arange(F) < dead_count
    by_hand, by_autograd, x = _parameters(), _parameters(), _batch()
    for tensor in by_autograd.named().values():
        tensor.requires_grad_()
    loss = dense_loss(by_autograd, x, K, dead)
    loss.backward()
    step = sparse_step(by_hand, x, K, dead, torch.empty(B, F))
    assert step.loss == pytest.approx(loss.item(), rel=1e-5)
    for name, tensor in by_hand.named().items():
        torch.testing.assert_close(tensor.grad, by_autograd.named()[name].grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 60, 640, 6000])
@pytest.mark.parametrize("shape", [(64, 96), (500, 300)])
def test_selection_equals_a_flat_top_k(shape: tuple[int, int], count: int) -> None:
    pre = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    codes = batch_top_k(pre, count)
    top = pre.flatten().topk(count)
    wanted = torch.zeros_like(pre).view(-1).scatter(0, top.indices, top.values).view(shape).relu()
    assert torch.equal(codes.matrix(codes.values).to_dense(), wanted)
    assert torch.equal(codes.transposed().matrix(codes.values).to_dense(), wanted.T)


def test_selection_survives_a_sample_that_sees_nothing() -> None:
    pre = torch.full((61, 61), -1.0)
    pre.view(-1)[1:100:2] = torch.arange(50) + 1.0
    codes = batch_top_k(pre, 20)
    assert sorted(codes.values.tolist()) == [31.0 + i for i in range(20)]


def test_selection_keeps_only_positive_entries() -> None:
    codes = batch_top_k(torch.full((4, 5), -1.0), 10)
    assert len(codes.values) == 0


def test_what_a_step_measures_is_what_it_kept() -> None:
    step = sparse_step(_parameters(), _batch(), K, torch.zeros(F, dtype=torch.bool), torch.empty(B, F))
    assert step.l0 == K
    assert step.loss == step.squared_error
    assert step.smallest > 0
    assert 0 < int(step.fired.sum()) <= F
