"""What every trained architecture is: parameters, a loss, hand-written gradients, a form for serving.

All numbers are in the units of the normalised input, x' = scale·x, whose mean squared distance to its centre
is one; `export` folds the scale away.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

__all__ = ["Architecture", "Export", "Moment", "Options", "Step", "remove_parallel", "to_unit_rows"]


class Options(BaseModel):
    """What is set of one architecture alone; a subclass stands in each architecture's file."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @property
    def betas(self) -> tuple[float, float]:
        """Adam's."""
        return 0.9, 0.999

    def default_lr(self, d_sae: int) -> float:
        """The learning rate where none is given: the scaling law of Gao et al. 2024, arXiv:2406.04093, §3."""
        return float(2e-4 * (16384 / d_sae) ** 0.5)


@dataclass(frozen=True)
class Moment:
    """Where a run stands when it takes a step.

    Attributes:
        dead: [F] bool, the features that have not fired for long.
        warmth: the share of the sparsity penalty that is in force, in [0, 1].
        seed: of what is random in this step.
    """

    dead: Tensor
    warmth: float = 1.0
    seed: int = 0

    @cached_property
    def any_dead(self) -> bool:
        """Whether there is anything to revive; asked of the device once a step."""
        return bool(self.dead.any())


@dataclass(frozen=True)
class Step:
    """What a step measured on its batch, before the parameters moved.

    Attributes:
        loss: all of it, per token. squared_error: ‖x − x̂‖² per token. l0: active features per token. All 0-d.
        fired: [F] bool.
    """

    loss: Tensor
    squared_error: Tensor
    l0: Tensor
    fired: Tensor

    @classmethod
    def of(cls, loss: Tensor, squared_error: Tensor, counts: Tensor, tokens: int) -> Step:
        """With l0 and fired from how often each feature fired. Args: counts: [F]. tokens: B."""
        return cls(loss, squared_error, counts.sum() / tokens, counts > 0)


@dataclass(frozen=True)
class Export:
    """A trained SAE in the model's own scale, as it is written to disk.

    Attributes:
        tensors: by the names of the layout, float32.
        config: the keys of `cfg.json` that the architecture decides, among them `architecture`.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]


@dataclass
class Architecture(ABC):
    """One SAE under training.

    Attributes:
        parameters: what the optimizer moves, float32, by name: `decoder` [F, d] and `b_dec` [d] among them.
        options: of this architecture.
        buffers: what a step changes besides, by name; saved with the parameters.
        precision: of the encoder's product; everything else is float32.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Options]]

    parameters: dict[str, Tensor]
    options: Any
    buffers: dict[str, Tensor] = field(default_factory=dict)
    precision: torch.dtype = torch.float32
    _scratch: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    @abstractmethod
    def start(cls, d_sae: int, b_dec: Tensor, options: Any, seed: int) -> Self:
        """Where training starts. Args: b_dec: [d], the centre of the normalised input."""

    @abstractmethod
    def loss(self, x: Tensor, moment: Moment) -> Tensor:
        """The loss in plain torch, differentiable by autograd: the reference of `step`. Args: x: [B, d]."""

    @abstractmethod
    def step(self, x: Tensor, moment: Moment) -> Step:
        """One forward and backward pass: sets `.grad` of every parameter to the gradient of `loss`."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """The activations that serving will see. Args: x: [B, d], normalised. Returns: [B, F]."""

    @abstractmethod
    def export(self, scale: float) -> Export:
        """The SAE with the input's scale folded in: activations and decoder in the model's own scale."""

    def decode(self, f: Tensor) -> Tensor:
        """The reconstruction Σ f_j·d_j + b_dec. Args: f: [B, F]. Returns: [B, d]."""
        return f @ self.parameters["decoder"] + self.parameters["b_dec"]

    def autoencode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations [B, F] and reconstruction [B, d] as serving will see them. Args: x: normalised."""
        f = self.encode(x)
        return f, self.decode(f)

    def before_update(self) -> None:
        """Change the gradients, once they are complete: by default, keep decoder rows on the unit sphere."""
        remove_parallel(self.parameters["decoder"])

    def after_update(self) -> None:
        """Put the parameters back where they belong: by default, decoder rows at unit norm."""
        to_unit_rows(self.parameters["decoder"])

    @property
    def exported_as(self) -> str:
        """SAELens' name of the architecture that was trained; it may be saved as another."""
        return self.name

    @property
    def d_sae(self) -> int:
        """Number of features F."""
        return self.parameters["decoder"].shape[0]

    @property
    def d_in(self) -> int:
        """Width d of the residual stream."""
        return self.parameters["b_dec"].shape[0]

    def to(self, device: torch.device) -> Self:
        """Move parameters and buffers, in place; returns self."""
        for kept in (self.parameters, self.buffers):
            for key, tensor in kept.items():
                kept[key] = tensor.to(device)
        self._scratch.clear()
        return self

    def grad(self, name: str) -> Tensor:
        """The gradient of a parameter to be written: the buffer of the last step, not zeroed."""
        parameter = self.parameters[name]
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        return parameter.grad

    def room(self, x: Tensor) -> Callable[[str], Tensor]:
        """`scratch` for the size of one batch."""
        return lambda name: self.scratch(name, x)

    def scratch(self, name: str, x: Tensor) -> Tensor:
        """A [B, F] float32 buffer that is allocated once: fresh pages would cost as much as a product."""
        shape = (x.shape[0], self.d_sae)
        kept = self._scratch.get(name)
        if kept is None or tuple(kept.shape) != shape or kept.device != x.device:
            self._scratch[name] = kept = torch.empty(shape, device=x.device)
        return kept


def remove_parallel(rows: Tensor) -> None:
    """Take out of a gradient what would only change the length of unit `rows`, in place.

    Source: Bricken et al. 2023, "Towards Monosemanticity", appendix.
    """
    grad = rows.grad
    assert grad is not None
    along = torch.einsum("fd,fd->f", grad, rows)
    grad.addcmul_(along.unsqueeze(1), rows, value=-1)


def to_unit_rows(rows: Tensor) -> None:
    """Scale every row to norm one, in place."""
    rows.div_(rows.norm(dim=-1, keepdim=True).clamp(min=1e-12))
