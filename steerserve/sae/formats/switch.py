"""Switch SAEs as their authors' trainer saves them: `config.json` and `ae.pt`.

    p = softmax(W_router·(x − b_router)),  i = argmax p
    f = top-k(relu(W_enc·(x − b_dec)))     of the features of expert i alone; all others are 0
    x̂ = p_i·(f @ decoder) + b_dec

Expert i owns the features [i·F/E, (i+1)·F/E). With `heaviside`, 1 stands in place of p_i.

Source: Mudide et al. 2024, arXiv:2410.08201, section 3, and github.com/amudide/switch_sae,
`dictionary_learning/trainers/switch.py`. That code calls p_i·f the features; here they are the paper's f, the
same numbers whatever the router's confidence, and p_i is the token's gain (`Encoded.gain`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from steerserve.errors import CheckpointError
from steerserve.sae.files import take
from steerserve.sae.hook import Hook
from steerserve.sae.router import Router
from steerserve.sae.sae import Sae
from steerserve.sae.torch_file import TorchFile

from .common import checked, constant, expect_only, matrix_shape, rectifier, stored
from .trainer_config import CONFIG, read_trainer, trained_at

__all__ = ["is_switch", "open_switch"]

_TENSORS = {"b_dec", "b_router", "decoder", "encoder.weight", "router.weight"}
_NEEDS_RESIDENT = "its router chooses an expert for each token, whose exact top-k compares all its features"


@dataclass(frozen=True)
class _Config:
    """What of `config.json` decides how the SAE computes; see Router and Sae."""

    k: int
    experts: int
    heaviside: bool
    hook: Hook | None
    refusal: str | None


def is_switch(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of such a file: a router is among them."""
    return "router.weight" in tensors


def open_switch(file: TorchFile) -> Sae:
    """Open one Switch SAE.

    Raises: CheckpointError if a file is damaged, or tensors and config contradict each other.
    """
    path, tensors = file.path, file.tensors
    expect_only(tensors, _TENSORS, "a Switch SAE", path)
    d_sae, d_in = matrix_shape(tensors, "decoder", path)
    config = _read_config(path, d_sae, d_in)
    router = Router(
        take(tensors, "router.weight", (config.experts, d_in), path).float(),
        take(tensors, "b_router", (d_in,), path).float(),
        config.heaviside,
    )
    sae = Sae(
        architecture="switch",
        d_in=d_in,
        d_sae=d_sae,
        hook=config.hook,
        path=path,
        stored=stored(
            take(tensors, "encoder.weight", (d_sae, d_in), path),
            tensors["decoder"],
            constant(0.0, d_sae),
            take(tensors, "b_dec", (d_in,), path),
            subtracts_b_dec=True,
        ),
        activation=rectifier(d_sae),
        refusal=config.refusal,
        needs_resident=_NEEDS_RESIDENT,
        top_k=config.k,
        router=router,
    )
    return checked(sae, path.parent, tensors)


def _read_config(path: Path, d_sae: int, d_in: int) -> _Config:
    fields = read_trainer(path.parent)
    if fields is None:
        message = f"expected `{CONFIG}` beside it, which says `k` and `experts`"
        raise CheckpointError(message, path=path)
    fields.equal("dict_size", d_sae, path.name)
    fields.equal("activation_dim", d_in, path.name)
    k, experts = fields.positive("k"), fields.positive("experts")
    if k > d_sae or d_sae % experts != 0:
        message = f"expected `experts` to divide, and `k` not to exceed, {d_sae} features"
        raise CheckpointError(f"{message}, got {experts} and {k}", path=fields.path)
    return _Config(k, experts, fields.flag("heaviside", default=False), *trained_at(fields))
