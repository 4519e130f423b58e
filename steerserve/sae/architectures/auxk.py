"""AuxK: the dead features learn to predict what the living ones miss.

    e = sg(x − x̂),  ê = Σ_{top k_aux of the dead} z_j·d_j,  α·min(n_dead / k_aux, 1)·‖e − ê‖² / ‖e − ē‖²

Source: Gao et al. 2024, arXiv:2406.04093, §2.4 and appendix A.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import LinearEncoder

__all__ = ["add_aux_gradients", "aux_gradients", "aux_loss"]

_WEIGHT = 1 / 32


def aux_loss(acts: Tensor, decoder: Tensor, error: Tensor, dead: Tensor) -> Tensor:
    """The term in plain torch, differentiable.

    Args: acts: [B, F], rectified pre-activations. error: [B, d], x − x̂. dead: [F] bool, at least one.
    """
    error = error.detach()
    top = acts[:, dead].topk(_k_aux(error.shape[1], dead), dim=-1)
    z = torch.zeros_like(acts[:, dead]).scatter(-1, top.indices, top.values)
    missed = (error - z @ decoder[dead]).square().sum()
    return _scale(error.shape[1], dead) * missed / _spread(error)


def add_aux_gradients(
    sae: LinearEncoder, pre: Tensor, centred: Tensor, error: Tensor, dead: Tensor
) -> Tensor:
    """Add the gradients of `aux_loss` to those of encoder, bias and decoder.

    Args: pre: [B, F] pre-activations. centred: [B, d]. error: [B, d], x̂ − x: the other sign.
    Returns: the loss, 0-d.
    """
    p = sae.parameters
    where = dead.nonzero().squeeze(1)
    loss, d_acts, d_decoder = aux_gradients(
        pre.index_select(1, where).relu_(), p["decoder"][where], error, dead
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
    acts: Tensor, decoder: Tensor, error: Tensor, dead: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The term and its gradients at the dead features' activations and decoder rows.

    Args: acts: [B, n], rectified, of the n dead features. decoder: [n, d]. error: [B, d], x̂ − x. dead: [F].
    Returns: the loss, 0-d; [B, n], 0 where an activation is 0; [n, d].
    """
    k_aux = _k_aux(error.shape[1], dead)
    if k_aux < acts.shape[1]:
        top = acts.topk(k_aux, dim=-1)
        acts = torch.zeros_like(acts).scatter_(-1, top.indices, top.values)
    beyond = acts @ decoder + error  # ê − e, because e = −error
    scale = _scale(error.shape[1], dead) / _spread(error)
    toward = beyond * (2 * scale)
    d_acts = (toward @ decoder.T) * (acts > 0)
    return beyond.square().sum() * scale, d_acts, acts.T @ toward


def _k_aux(d_in: int, dead: Tensor) -> int:
    return min(max(1, d_in // 2), int(dead.sum()))


def _scale(d_in: int, dead: Tensor) -> float:
    return _WEIGHT * min(int(dead.sum()) / max(1, d_in // 2), 1.0)


def _spread(error: Tensor) -> Tensor:
    return (error - error.mean(0)).square().sum().clamp(min=1e-12)
