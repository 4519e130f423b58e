"""What steering means, computed by others: HF transformers with forward hooks, and SAELens' own encode and
decode.

Nothing here calls steerserve. Windows and operations are written out plainly, token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

Intervention = dict[str, Any]
Steering = list[Intervention] | dict[str, Any]
_EDIT: dict[str, Callable[[Tensor, float], Tensor]] = {
    "clamp": lambda f, v: torch.full_like(f, v),
    "ablate": lambda f, v: torch.zeros_like(f),
    "scale": lambda f, v: f * v,
    "add": lambda f, v: f + v,
    "at_least": lambda f, v: torch.where(f < v, torch.full_like(f, v), f),
    "at_most": lambda f, v: torch.where(f > v, torch.full_like(f, v), f),
}


class Reference:
    """A model steered by hooks.

    Args:
        model: folder of the model.
        saes: name → (folder, index of the hook point: 0 the embeddings, L + 1 behind layer L).
        directions: name → (unit vector [d], index of the hook point).
        special: ids of the special tokens.
    """

    def __init__(
        self,
        model: Path,
        saes: dict[str, tuple[Path, int]],
        directions: dict[str, tuple[Tensor, int]] | None = None,
        special: frozenset[int] = frozenset({0, 1, 2}),
    ) -> None:
        # Not at the top: what needs no SAE of SAELens' works where it is not installed.
        from .saes import load_sae

        self.model = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").float().eval()
        self.saes = {name: (load_sae(folder), point) for name, (folder, point) in saes.items()}
        self.directions = directions or {}
        self.special = special

    @torch.no_grad()
    def logprobs(self, prompt: list[int], output: list[int], steering: Steering) -> Tensor:
        """Log-probabilities of each output token, the whole sequence computed in one steered pass.

        Args: steering: the interventions, or a whole `steering` object.
        Returns: [len(output)].
        """
        ids = prompt + output[:-1]
        return self.all_logprobs(ids, len(prompt), steering)[len(prompt) - 1 :].gather(
            1, torch.tensor(output).unsqueeze(1)
        )[:, 0]

    @torch.no_grad()
    def all_logprobs(self, ids: list[int], prompt_len: int, steering: Steering) -> Tensor:
        """[len(ids), vocab] log-probabilities after each position of one steered pass."""
        handles = self._hook(ids, prompt_len, steering)
        try:
            logits: Tensor = self.model(torch.tensor([ids]), use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return logits.float().log_softmax(-1)

    def _hook(self, ids: list[int], prompt_len: int, steering: Steering) -> list[Any]:
        whole = steering if isinstance(steering, dict) else {"interventions": steering}
        drop = whole.get("error") == "drop"
        by_point: dict[int, list[Intervention]] = {}
        for one in whole["interventions"]:
            by_point.setdefault(self._point(one), []).append(one)
            for c in conditions_of(one):
                by_point.setdefault(self.saes[_sae_of(c, one)][1], [])
        self._came: dict[int, Tensor] = {}
        return [self._hook_point(p, own, ids, prompt_len, drop) for p, own in by_point.items()]

    def _point(self, one: Intervention) -> int:
        return self.directions[one["direction"]][1] if "direction" in one else self.saes[one["sae"]][1]

    def _hook_point(
        self, point: int, own: list[Intervention], ids: list[int], prompt_len: int, drop: bool
    ) -> Any:
        layers = self.model.transformer.h if hasattr(self.model, "transformer") else self.model.model.layers

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (self._edit(args[0], point, own, ids, prompt_len, drop), *args[1:]), kwargs
            hidden = self._edit(kwargs["hidden_states"], point, own, ids, prompt_len, drop)
            return args, kwargs | {"hidden_states": hidden}

        def after(module: Any, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (self._edit(output[0], point, own, ids, prompt_len, drop), *output[1:])
            return self._edit(output, point, own, ids, prompt_len, drop)

        if point == 0:
            return layers[0].register_forward_pre_hook(before, with_kwargs=True)
        return layers[point - 1].register_forward_hook(after)

    def _edit(
        self, x: Tensor, point: int, own: list[Intervention], ids: list[int], prompt_len: int, drop: bool
    ) -> Tensor:
        x = x.clone()
        stream = x[0]
        self._came[point] = stream.clone()
        if not own:
            return x
        change = torch.zeros_like(stream)
        for one in own:
            change += self._change(stream, one, ids, prompt_len)
        if drop:
            change += self._reconstruction_error(stream, own, ids, prompt_len)
        x[0] = stream + change
        return x

    def _reconstruction_error(
        self, stream: Tensor, own: list[Intervention], ids: list[int], prompt_len: int
    ) -> Tensor:
        """decode(encode(x)) − x of the one SAE that is named here, at every token that a window selects."""
        (name,) = {one["sae"] for one in own if "sae" in one}
        sae = self.saes[name][0]
        selected = [
            any(touches(one, p, ids, prompt_len, self.special) for one in own) for p in range(len(ids))
        ]
        return torch.where(torch.tensor(selected).unsqueeze(1), sae.decode(sae.encode(stream)) - stream, 0.0)

    def _holds(self, one: Intervention) -> Tensor:
        """[tokens] whether all conditions hold, each read from the stream as it came to its hook point."""
        holds = torch.tensor(True)
        for c in conditions_of(one):
            sae, point = self.saes[_sae_of(c, one)]
            f = sae.encode(self._came[point])[:, c["feature"]]
            holds = holds & (f > c.get("above", -torch.inf)) & (f < c.get("below", torch.inf))
        return holds

    @torch.no_grad()
    def activations(
        self, ids: list[int], prompt_len: int, sae: str, feature: int, steering: Steering | tuple[()] = ()
    ) -> Tensor:
        """[len(ids)] of one feature, in one steered pass."""
        whole = list(steering["interventions"] if isinstance(steering, dict) else steering)
        watch = {"sae": sae, "feature": feature, "op": "add", "value": 0.0}
        self.all_logprobs(ids, prompt_len, [*whole, watch])
        loaded, point = self.saes[sae]
        encoded: Tensor = loaded.encode(self._came[point])[:, feature]
        return encoded

    def _change(self, stream: Tensor, one: Intervention, ids: list[int], prompt_len: int) -> Tensor:
        mask = torch.tensor([touches(one, p, ids, prompt_len, self.special) for p in range(len(ids))])
        window = mask
        value = float(one.get("value") or 0.0)
        if "direction" in one:
            unit = self.directions[one["direction"]][0]
            f = stream @ unit
            mask &= ~torch.tensor(bool(one.get("only_if_active"))) | (f > 0)
            return torch.where(mask, _EDIT[one["op"]](f, value) - f, 0.0).unsqueeze(1) * unit
        sae = self.saes[one["sae"]][0]
        f = sae.encode(stream)
        j = one["feature"]
        if one.get("only_if_active"):
            mask = mask & (f[:, j] > 0)
        mask = mask & self._holds(one)
        if one.get("latch"):
            mask = window & (mask.cumsum(0) > 0)
        edited = f.clone()
        edited[mask, j] = _EDIT[one["op"]](f[mask, j], value)
        return _decoded(sae, edited, stream) - _decoded(sae, f, stream)


def conditions_of(one: Intervention) -> list[dict[str, Any]]:
    """The conditions as a list, however they were written."""
    conditions = one.get("when", [])
    return [conditions] if isinstance(conditions, dict) else conditions


def _sae_of(condition: dict[str, Any], one: Intervention) -> str:
    """The SAE that a condition reads: its own, or its intervention's."""
    return str(condition.get("sae", one.get("sae")))


def _decoded(sae: Any, f: Tensor, stream: Tensor) -> Tensor:
    """SAELens decodes with what it remembers of the token it encoded last, once."""
    sae.encode(stream)
    decoded: Tensor = sae.decode(f)
    return decoded


def touches(
    one: Intervention, position: int, ids: list[int], prompt_len: int, special: frozenset[int]
) -> bool:
    """Whether `where` selects one position, read off the documentation and not off the code."""
    where = one.get("where", {})
    phase = where.get("phase", "all")
    token = ids[position]
    samples_first = position == prompt_len - 1 and phase != "prompt"
    if token in special and not where.get("special_tokens") and not samples_first:
        return False
    if phase == "prompt" and position >= prompt_len:
        return False
    if phase == "generation" and position < prompt_len - 1:
        return False
    if position in _absolute(where.get("exclude_positions", []), prompt_len):
        return False
    if token in where.get("exclude_tokens", []):
        return False
    begin = prompt_len - 1 if phase == "generation" else 0
    includes = []
    if "start" in where or "stop" in where:
        start, stop = where.get("start", 0), where.get("stop")
        low = prompt_len + start if start < 0 else begin + start
        high = len(ids) if stop is None else (prompt_len + stop if stop < 0 else begin + stop)
        includes.append(low <= position < high)
    if "positions" in where:
        includes.append(position in _absolute(where["positions"], prompt_len))
    if "tokens" in where:
        includes.append(token in where["tokens"])
    return any(includes) if includes else True


def _absolute(positions: list[int], prompt_len: int) -> list[int]:
    return [p + prompt_len if p < 0 else p for p in positions]
