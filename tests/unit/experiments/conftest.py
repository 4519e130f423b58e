from __future__ import annotations

from collections.abc import Callable

import pytest
import torch


class _Loss(torch.nn.Module):
    def __init__(self, sae: torch.nn.Module) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.sae.loss(x)
        return found


@pytest.fixture
def check_gradients() -> Callable[[torch.nn.Module, torch.Tensor], bool]:
    """Holds autograd's gradient of .loss(x), for every parameter, to finite differences; float64 wanted."""

    def check(sae: torch.nn.Module, x: torch.Tensor) -> bool:
        names = [f"sae.{name}" for name, _ in sae.named_parameters()]
        start = tuple(value.detach().clone().requires_grad_() for value in sae.parameters())

        def loss(*values: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(_Loss(sae), dict(zip(names, values, strict=True)), (x,))

        return torch.autograd.gradcheck(loss, start, eps=1e-6, atol=1e-7)

    return check
