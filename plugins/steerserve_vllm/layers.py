"""Finding a model's decoder layers by structure, and putting the op behind (or before) one of them.

A layer keeps its name, its parameters and its type's ancestry: only its class is exchanged for a subclass
whose forward calls the original and then the op. So weights, LoRA, sleep mode and torch.compile see the
module they know.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models.utils import PPMissingLayer

from steerserve.errors import IncompatibleError

from .op import steer_op

__all__ = ["LayerList", "find_layers", "hook_points", "stop_behind"]


@dataclass(frozen=True)
class LayerList:
    """The decoder layers of a model: those from `start` to `end` live in this process."""

    layers: nn.ModuleList
    start: int
    end: int

    def holds(self, point: int) -> bool:
        """Whether the stream at this hook point can be reached here: behind a layer, or before layer 0."""
        return self.start <= max(point - 1, 0) < self.end


def find_layers(model: nn.Module, n_layers: int) -> LayerList:
    """The one list of `n_layers` modules that turn hidden states into hidden states.

    Holds for vLLM's own models and for those it runs through Transformers. Layers of other pipeline stages
    are placeholders in the same list.

    Raises: IncompatibleError if there is none, or more than one; or if a layer's forward was replaced.
    """
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and _here(module)
    ]
    if len(found) != 1:
        raise IncompatibleError(
            f"expected one list of {n_layers} decoder layers in {type(model).__name__}, found {len(found)}: "
            "this model's residual stream cannot be located with certainty"
        )
    here = _here(found[0])
    _check_forwards(found[0], here)
    return LayerList(found[0], here[0], here[-1] + 1)


def _here(layers: nn.ModuleList) -> list[int]:
    """The indices of the decoder layers that this process holds; empty if they are something else."""
    held = [i for i, layer in enumerate(layers) if not isinstance(layer, PPMissingLayer)]
    takes = (inspect.signature(type(layers[i]).forward).parameters for i in held)
    return held if all("hidden_states" in parameters for parameters in takes) else []


def _check_forwards(layers: nn.ModuleList, here: Iterable[int]) -> None:
    """A forward that a layer itself carries is called in place of its class's, with the op in it."""
    replaced = [i for i in here if "forward" in vars(layers[i])]
    if replaced:
        raise IncompatibleError(
            f"expected layers that run their own forward, but that of layers {replaced} was replaced, "
            "which offloading weights does (cpu_offload_gb, offload_group_size): steering would be passed by"
        )


def hook_points(
    layers: LayerList, points: Iterable[int], width: int, *, dtype: torch.dtype, device: torch.device | str
) -> list[int]:
    """Put the op at those of the hook points whose layers are here.

    Args:
        width: d_model, which the stream must have.
        dtype, device: of the stream; parameters may be of any other dtype, where they are quantised.
    Returns: the points that were hooked.
    Raises: IncompatibleError if a layer's output is not a residual stream that is understood.
    """
    here = sorted(point for point in set(points) if layers.holds(point))
    by_layer: dict[int, list[int]] = {}
    for point in here:
        by_layer.setdefault(max(point - 1, 0), []).append(point)
    for index, own in by_layer.items():
        layer = layers.layers[index]
        if "residual" in inspect.signature(type(layer).forward).parameters:
            like = torch.linspace(-1, 1, width, device=device).to(dtype)
            _check_residual_is_added(layer, like)
        _hook(layer, before=0 in own, after=next((p for p in own if p > 0), None), width=width)
    return here


def stop_behind(layers: LayerList, point: int) -> None:
    """Let every layer behind a hook point pass on what it is given: nothing of them is computed.

    Call it before `hook_points`. What the model then samples means nothing.
    """
    for layer in list(layers.layers)[max(point, layers.start) : layers.end]:
        cls = type(layer)
        forward = _idle_forward(cls)
        layer.__class__ = type(f"Idle{cls.__name__}", (cls,), {"forward": forward, "__module__": __name__})


def _idle_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    parameters = list(inspect.signature(cls.forward).parameters)[1:]
    place = parameters.index("hidden_states")
    pair = parameters.index("residual") if "residual" in parameters else None

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[place]
        if pair is None:
            return hidden
        residual = kwargs["residual"] if "residual" in kwargs else args[pair]
        if residual is None:
            # The first layer, whose stream has no second summand yet.
            return torch.zeros_like(hidden), hidden
        return hidden, residual

    return forward


def _hook(layer: nn.Module, *, before: bool, after: int | None, width: int) -> None:
    cls = type(layer)
    parameters = list(inspect.signature(cls.forward).parameters)
    if before and _NORMED_EMBEDDINGS in parameters:
        raise _second_input(cls)
    forward = _steered_forward(cls, parameters.index("hidden_states") - 1, before, after, width)
    layer.__class__ = type(f"Steered{cls.__name__}", (cls,), {"forward": forward, "__module__": __name__})


def _steered_forward(
    cls: type[nn.Module], place: int, before: bool, after: int | None, width: int
) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if before:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[place]
            _check_sole_input(self, hidden, [*args, *kwargs.values()], width)
            # A copy: the embeddings may live in a buffer that the runner keeps.
            own = _steered(hidden.clone(), None, 0, width)
            if "hidden_states" in kwargs:
                kwargs["hidden_states"] = own
            else:
                args = (*args[:place], own, *args[place + 1 :])
        out = cls.forward(self, *args, **kwargs)
        if after is None:
            return out
        if isinstance(out, Tensor):
            return _steered(out, None, after, width)
        hidden, residual = out
        if residual is None:
            return _steered(hidden, None, after, width), None
        return hidden, _steered(residual, hidden, after, width)

    return forward


def _check_sole_input(layer: nn.Module, hidden: Tensor, given: Iterable[Any], width: int) -> None:
    """What else is as wide as the stream was made of the embeddings before they are steered."""
    if any(isinstance(one, Tensor) and one is not hidden and one.shape[-1:] == (width,) for one in given):
        raise _second_input(type(layer))


# As DeepSeek-V3.2 and Inkling call what their first layer's norm made of the embeddings, before that layer.
_NORMED_EMBEDDINGS = "attn_in"


def _second_input(cls: type[nn.Module]) -> IncompatibleError:
    return IncompatibleError(f"{cls.__name__} is given more than the embeddings that resid_pre.0 would steer")


def _steered(stream: Tensor, addend: Tensor | None, point: int, width: int) -> Tensor:
    # Models that run through Transformers carry a batch dimension of one.
    flat = stream[0] if stream.dim() == 3 and stream.shape[0] == 1 else stream
    if flat.dim() != 2 or flat.shape[1] != width:
        raise IncompatibleError(f"expected a stream of shape [tokens, {width}], got {tuple(stream.shape)}")
    steer_op(flat, addend, point)
    return stream


def _check_residual_is_added(layer: nn.Module, like: Tensor) -> None:
    """Layers that return (hidden_states, residual) mean their sum only if the next norm adds them. Try it.

    Args: like: [d] some token of the stream.
    """
    norm = next((child for child in layer.children() if _takes_residual(child)), None)
    if norm is None:
        raise IncompatibleError(
            f"{type(layer).__name__} passes a residual on, but has no norm that adds it to the stream"
        )
    hidden = like.expand(2, -1)
    residual = hidden.flip(-1) * 0.5 + 0.25
    with torch.no_grad():
        _, added = norm(hidden.clone(), residual.clone())
    if not torch.allclose(added.float(), (hidden + residual).float(), atol=1e-2):
        raise IncompatibleError(
            f"{type(layer).__name__}'s norm does not add `residual` to the stream: where x lies is not known"
        )


def _takes_residual(module: nn.Module) -> bool:
    forward = getattr(module, "forward_native", module.forward)
    return "norm" in type(module).__name__.lower() and "residual" in inspect.signature(forward).parameters
