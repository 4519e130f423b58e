"""AuxK: the dead features learn to predict what the living ones miss.

    e = sg(x − x̂),  ê = Σ_{top k_aux of the dead} z_j·d_j,  α·min(n_dead / k_aux, 1)·‖e − ê‖² / ‖e − ē‖²

Source: Gao et al. 2024, arXiv:2406.04093, §2.4 and appendix A.2.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .base import Options
from .linear import LinearEncoder

__all__ = ["AuxKOptions", "TopKOptions", "add_aux_gradients", "aux_gradients", "aux_loss"]


class TopKOptions(Options):
    """Settings of the top-k family."""

    k: Annotated[int, Field(ge=1, description="Active features per token (topk family: on average).")] = 32


class AuxKOptions(TopKOptions):
    """Settings of the top-k family where the dead are revived by AuxK."""

    aux: Annotated[
        float,
        Field(ge=0, description="α of AuxK: how much the dead are made to learn what the living miss."),
    ] = 1 / 32


def aux_loss(acts: Tensor, decoder: Tensor, error: Tensor, dead: Tensor, weight: float) -> Tensor:
    """The term in plain torch, differentiable.

    Args: acts: [B, F], rectified pre-activations. error: [B, d], x − x̂. dead: [F] bool, at least one.
        weight: α.
    """
    error = error.detach()
    top = acts[:, dead].topk(_k_aux(error.shape[1], dead), dim=-1)
    z = torch.zeros_like(acts[:, dead]).scatter(-1, top.indices, top.values)
    missed = (error - z @ decoder[dead]).square().sum()
    return weight * _scale(error.shape[1], dead) * missed / _spread(error)


def add_aux_gradients(
    sae: LinearEncoder, centred: Tensor, error: Tensor, dead: Tensor, weight: float
) -> Tensor:
    """Add the gradients of `aux_loss` to those of encoder, bias and decoder.

    Args: centred: [B, d]. error: [B, d], x̂ − x: the other sign. weight: α.
    Returns: the loss, 0-d.
    """
    p = sae.parameters
    where = dead.nonzero().squeeze(1)
    loss, d_acts, d_decoder = aux_gradients(
        sae.pre_of(where, centred).relu_(), p["decoder"][where], error, dead, weight
    )
    for name, part in (
        ("decoder", d_decoder),
        ("encoder", d_acts.T @ centred),
        ("bias", d_acts.sum(0)),
    ):
        grad = p[name].grad
        assert grad is not None
        grad.index_add_(0, where, part)
    return loss


def aux_gradients(
    acts: Tensor, decoder: Tensor, error: Tensor, dead: Tensor, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The term and its gradients at the dead features' activations and decoder rows.

    Args: acts: [B, n], rectified, of the n dead features. decoder: [n, d]. error: [B, d], x̂ − x. dead: [F].
        weight: α.
    Returns: the loss, 0-d; [B, n], 0 where an activation is 0; [n, d].
    """
    k_aux = _k_aux(error.shape[1], dead)
    if k_aux < acts.shape[1]:
        top = acts.topk(k_aux, dim=-1)
        acts = torch.zeros_like(acts).scatter_(-1, top.indices, top.values)
    beyond = acts @ decoder + error  # ê − e, because e = −error
    scale = weight * _scale(error.shape[1], dead) / _spread(error)
    toward = beyond * (2 * scale)
    d_acts = (toward @ decoder.T) * (acts > 0)
    return beyond.square().sum() * scale, d_acts, acts.T @ toward


def _k_aux(d_in: int, dead: Tensor) -> int:
    return min(max(1, d_in // 2), int(dead.sum()))


def _scale(d_in: int, dead: Tensor) -> float:
    return min(int(dead.sum()) / max(1, d_in // 2), 1.0)


def _spread(error: Tensor) -> Tensor:
    return (error - error.mean(0)).square().sum().clamp(min=1e-12)
