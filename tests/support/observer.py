"""A worker extension that reads the stream behind a hook again, by SAELens' formula and not by ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["Observer", "Watcher"]

WEIGHTS = "sae_weights.safetensors"


class Watcher:
    """Keeps the largest activation of some features over all tokens, before and behind one hook point.

    Args: folder: a JumpReLU SAE in SAELens' layout. features: those that are watched. point: the hook point's
        index. runtime: whose op is wrapped.
    """

    def __init__(self, folder: Path, features: list[int], point: int, runtime: Any) -> None:
        tensors = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}
        config = json.loads((folder / "cfg.json").read_text())
        assert config["architecture"] == "jumprelu", config["architecture"]
        self.encoder, self.bias = tensors["W_enc"][:, features], tensors["b_enc"][features]
        self.threshold = tensors["threshold"][features].clamp(min=0)
        self.shift = tensors["b_dec"] if config["apply_b_dec_to_input"] else torch.zeros(1)
        self.point, self.original = point, runtime.steer
        self.tokens = self.fired_before = self.fired_behind = 0
        self.before = self.exact = self.rounded = 0.0

    def steer(self, point: int, stream: Tensor, addend: Tensor | None) -> None:
        """In the place of the runtime's own: the same, with a look before and behind."""
        if point != self.point:
            self.original(point, stream, addend)
            return
        before = self._activations(_sum(stream, addend))
        self.original(point, stream, addend)
        found = _sum(stream, addend)
        exact, rounded = self._activations(found), self._activations(found.to(stream.dtype).float())
        self.tokens += len(found)
        self.fired_before += int((before > 0).any(dim=1).sum())
        self.fired_behind += int(((exact > 0) | (rounded > 0)).any(dim=1).sum())
        self.before = max(self.before, float(before.max()))
        self.exact = max(self.exact, float(exact.max()))
        self.rounded = max(self.rounded, float(rounded.max()))

    def _activations(self, x: Tensor) -> Tensor:
        """[tokens, features] raw units. Source: Rajamanoharan et al. 2024, arXiv:2407.14435, eq. 3."""
        z = (x - self.shift) @ self.encoder + self.bias
        # NaN is above no threshold, and would pass for an activation of zero.
        return torch.where(z.isfinite(), torch.where(z > self.threshold, z, 0.0), torch.inf)


class Observer:
    """For `--worker-extension-cls`: what `/collective_rpc` may ask of a worker beside vLLM's own."""

    def attack_observe(self: Any, folder: str, features: list[int], layer: int) -> None:
        """Begin to watch, anew, the stream behind a decoder layer."""
        from steerserve_vllm.attach import attached_to_runner

        attached = attached_to_runner(self.model_runner)
        assert attached is not None
        runtime = attached.runtime
        vars(runtime).pop("steer", None)
        self._attack_watcher = Watcher(Path(folder), features, layer + 1, runtime)
        runtime.steer = self._attack_watcher.steer

    def attack_observed(self: Any) -> dict[str, float]:
        """What was seen since."""
        names = ("tokens", "fired_before", "fired_behind", "before", "exact", "rounded")
        return {name: getattr(self._attack_watcher, name) for name in names}


def _sum(stream: Tensor, addend: Tensor | None) -> Tensor:
    return stream.float() + (0 if addend is None else addend.float())
