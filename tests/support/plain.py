"""Switch, kron and vaease SAEs by their papers' formulas, token by token: nothing here calls steerserve."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["PLAIN", "Plain"]

Tensors = dict[str, Tensor]


class Plain:
    """An SAE that our trainer saved. Like SAELens, it decodes with what it remembers of the last encode."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "cfg.json").read_text())
        self.tensors = load_file(folder / "sae_weights.safetensors")
        self.gain = torch.ones(1, 1)

    def encode(self, x: Tensor) -> Tensor:
        """Args: x: [n, d]. Returns: [n, F]."""
        one = PLAIN[self.config["architecture"]]
        tokens = [one(self.tensors, self.config, token) for token in x.float()]
        self.gain = torch.tensor([[gain] for _, gain in tokens])
        return torch.stack([f for f, _ in tokens])

    def decode(self, f: Tensor) -> Tensor:
        """Args: f: [n, F]. Returns: [n, d]."""
        return self.gain * (f @ self.tensors["W_dec"]) + self.tensors["b_dec"]


def _switch(t: Tensors, config: dict[str, Any], x: Tensor) -> tuple[Tensor, float]:
    """arXiv:2410.08201, section 3."""
    p = torch.softmax(t["W_router"] @ (x - t["b_router"]), dim=0)
    expert = int(p.argmax())
    size = config["d_sae"] // config["experts"]
    pre = torch.relu((x - t["b_dec"]) @ t["W_enc"]).tolist()
    return _largest({j: pre[j] for j in range(expert * size, (expert + 1) * size)}, config), float(p[expert])


def _kron(t: Tensors, config: dict[str, Any], x: Tensor) -> tuple[Tensor, float]:
    """arXiv:2505.22255, section 3: mAND of every pair within a head."""
    heads, m, n = config["heads"], config["base"], config["extension"]
    u = ((x - t["b_dec"]) @ t["W_left"] + t["b_left"]).reshape(heads, m).tolist()
    v = ((x - t["b_dec"]) @ t["W_right"] + t["b_right"]).reshape(heads, n).tolist()
    z = [
        math.sqrt(u[h][i] * v[h][j]) if u[h][i] > 0 and v[h][j] > 0 else 0.0
        for h in range(heads)
        for i in range(m)
        for j in range(n)
    ]
    return _largest(dict(enumerate(z)), config), 1.0


def _vaease(t: Tensors, config: dict[str, Any], x: Tensor) -> tuple[Tensor, float]:
    """arXiv:2506.04859: (1 - sigma) mu with no noise, of the latents whose sigma is below one half."""
    y = x - t["b_dec"]
    mu = y @ t["W_enc"] + t["b_enc"]
    sigma = 1 / (1 + torch.exp(y @ t["W_gate"] + t["b_gate"]))
    return (1 - sigma) * mu * (sigma < 0.5), 1.0


def _largest(values: dict[int, float], config: dict[str, Any]) -> Tensor:
    f = torch.zeros(config["d_sae"])
    for j in sorted(values, key=lambda j: -values[j])[: config["k"]]:
        f[j] = values[j]
    return f


PLAIN: dict[str, Callable[[Tensors, dict[str, Any], Tensor], tuple[Tensor, float]]] = {
    "kron": _kron,
    "switch": _switch,
    "vaease": _vaease,
}
