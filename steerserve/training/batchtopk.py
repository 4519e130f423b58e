"""BatchTopK with AuxK: one training step by hand-written sparse gradients, and its plain reference.

Sources: Bussmann et al. 2024, arXiv:2412.06410 (BatchTopK, running threshold); Gao et al. 2024,
arXiv:2406.04093 (AuxK, unit-norm decoder).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .codes import batch_top_k

__all__ = ["AUX_WEIGHT", "Parameters", "Step", "dense_loss", "sparse_step"]

AUX_WEIGHT = 1 / 32


@dataclass(frozen=True)
class Parameters:
    """The trained tensors, float32, in the units of the normalised input.

    Attributes:
        encoder: [F, d], row j reads feature j. bias: [F]. decoder: [F, d], rows of unit norm. b_dec: [d].
    """

    encoder: Tensor
    bias: Tensor
    decoder: Tensor
    b_dec: Tensor

    def named(self) -> dict[str, Tensor]:
        """By name, in a fixed order."""
        return {
            "b_dec": self.b_dec,
            "bias": self.bias,
            "decoder": self.decoder,
            "encoder": self.encoder,
        }


@dataclass(frozen=True)
class Step:
    """What a step measured on its batch, before the parameters moved.

    Attributes:
        loss: squared error per token plus AuxK. squared_error: the first part alone.
        l0: active features per token. smallest: the smallest kept activation, a sample of the threshold.
        fired: [F] bool.
    """

    loss: float
    squared_error: float
    l0: float
    smallest: float
    fired: Tensor


def dense_loss(parameters: Parameters, x: Tensor, k: int, dead: Tensor) -> Tensor:
    """The loss in plain torch, differentiable by autograd: the reference of `sparse_step`.

    Args: x: [B, d], normalised. k: active features per token on average. dead: [F] bool.
    """
    p = parameters
    pre = (x - p.b_dec) @ p.encoder.T + p.bias
    acts = pre.relu()
    bound = acts.flatten().topk(k * len(x)).values[-1]
    x_hat = torch.where(acts >= bound, acts, 0.0) @ p.decoder + p.b_dec
    loss = (x_hat - x).square().sum() / len(x)
    if not dead.any():
        return loss
    error = (x - x_hat).detach()
    top = acts[:, dead].topk(_k_aux(x.shape[1], dead), dim=-1)
    z = torch.zeros_like(acts[:, dead]).scatter(-1, top.indices, top.values)
    missed = (error - z @ p.decoder[dead]).square().sum()
    return loss + _aux_scale(x.shape[1], dead) * missed / _spread(error)


def sparse_step(parameters: Parameters, x: Tensor, k: int, dead: Tensor, pre: Tensor) -> Step:
    """One forward and backward pass: one dense matrix product, everything else on the k·B kept entries.

    Sets `.grad` of every parameter to the gradient of `dense_loss`.

    Args: as in `dense_loss`; pre: [B, F] float32, overwritten.
    """
    p = parameters
    centred = x - p.b_dec
    torch.addmm(p.bias, centred, p.encoder.T, out=pre)
    codes = batch_top_k(pre, k * len(x))
    kept = codes.matrix(codes.values)
    error = torch.addmm(p.b_dec.expand_as(x), kept, p.decoder) - x
    squared = float(error.square().sum()) / len(x)
    toward = error * (2 / len(x))

    d_values = torch.sparse.sampled_addmm(kept, toward, p.decoder.T, beta=0.0).values()
    by_feature = codes.transposed()
    p.decoder.grad = by_feature.matrix(codes.values) @ toward
    p.encoder.grad = by_feature.matrix(d_values) @ centred
    p.bias.grad = torch.zeros_like(p.bias).index_add_(0, codes.features, d_values)
    aux = _add_aux(p, centred, error, dead, pre) if bool(dead.any()) else 0.0
    # x enters the encoder as x − b_dec: b_dec's gradient there is the bias's, sent back through the encoder.
    p.b_dec.grad = toward.sum(0) - p.bias.grad @ p.encoder

    fired = torch.bincount(codes.features, minlength=len(p.bias)) > 0
    smallest = float(codes.values.min()) if len(codes.values) else 0.0
    return Step(squared + aux, squared, len(codes.values) / len(x), smallest, fired)


def _add_aux(p: Parameters, centred: Tensor, error: Tensor, dead: Tensor, pre: Tensor) -> float:
    """Add the gradients of AuxK: the dead features learn to predict what the living ones miss."""
    assert p.encoder.grad is not None
    assert p.decoder.grad is not None
    assert p.bias.grad is not None
    where = dead.nonzero().squeeze(1)
    acts, decoder = pre[:, where].relu(), p.decoder[where]
    k_aux = _k_aux(centred.shape[1], dead)
    if k_aux < len(where):
        top = acts.topk(k_aux, dim=-1)
        acts = torch.zeros_like(acts).scatter_(-1, top.indices, top.values)
    beyond = acts @ decoder + error  # ê − e, because e = −error
    scale = _aux_scale(centred.shape[1], dead) / _spread(error)
    toward = beyond * (2 * scale)
    d_acts = (toward @ decoder.T) * (acts > 0)
    p.decoder.grad.index_add_(0, where, acts.T @ toward)
    p.encoder.grad.index_add_(0, where, d_acts.T @ centred)
    p.bias.grad.index_add_(0, where, d_acts.sum(0))
    return float(beyond.square().sum() * scale)


def _k_aux(d_in: int, dead: Tensor) -> int:
    return min(d_in // 2, int(dead.sum()))


def _aux_scale(d_in: int, dead: Tensor) -> float:
    return AUX_WEIGHT * min(int(dead.sum()) / (d_in // 2), 1.0)


def _spread(error: Tensor) -> Tensor:
    return (error - error.mean(0)).square().sum().clamp(min=1e-12)
