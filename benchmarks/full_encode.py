"""The usual way to steer by features: HF transformers, static batches, and a hook that runs the whole SAE.

A process of its own, started by `benchmarks.child`. The SAE is SAELens' own object.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from .worker import Serve, work

__all__ = ["FullEncode", "serve_arrivals", "start"]


class FullEncode:
    """A forward hook: x + decode(f′) − decode(f), where f = encode(x) has every feature of the dictionary.

    Args: sae: SAELens' SAE.
    """

    def __init__(self, sae: Any) -> None:
        self._sae = sae
        self._features = torch.empty(0)
        self._values = torch.empty(0)

    def set_plans(self, plans: Sequence[dict[str, Any] | None]) -> None:
        """The clamps of each sequence of the batch, as many for each; or none at all."""
        rows = [plan["interventions"] for plan in plans if plan is not None]
        self._features = torch.tensor([[row["feature"] for row in own] for own in rows])
        self._values = torch.tensor([[row["value"] for row in own] for own in rows], dtype=self._sae.dtype)

    def __call__(self, module: torch.nn.Module, args: Any, x: Tensor) -> Tensor:
        """x: [batch, tokens, d], what the decoder layer returned."""
        if not len(self._features):
            return x
        activations = self._sae.encode(x)
        shape = (*x.shape[:2], self._features.shape[1])
        features = self._features.unsqueeze(1).expand(shape)
        edited = activations.scatter(2, features, self._values.unsqueeze(1).expand(shape))
        error = x - self._sae.decode(activations)
        steered: Tensor = self._sae.decode(edited) + error
        return steered.to(x.dtype)


@dataclass(frozen=True)
class _Hooked:
    model: Any
    hook: FullEncode
    batch: int


def start(options: dict[str, Any]) -> tuple[dict[str, Any], Serve]:
    """Load model and SAE; a turn holds `arrivals`."""
    from sae_lens import SAE

    torch.set_num_threads(options["threads"])
    dtype = getattr(torch, options["dtype"])
    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=dtype).eval()
    # Every answer has the length that was asked for, on both sides.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    hook = FullEncode(SAE.load_from_disk(options["sae"], device="cpu", dtype=options["dtype"]))
    model.model.layers[options["layer"]].register_forward_hook(hook)
    description = {
        "dtype": str(model.dtype),
        "threads": torch.get_num_threads(),
        "attention": model.config._attn_implementation,
        "batch": options["batch"],
    }
    serve = partial(serve_arrivals, _Hooked(model, hook, options["batch"]))
    return description, lambda turn: serve(turn["arrivals"])


def serve_arrivals(hooked: _Hooked, arrivals: list[dict[str, Any]]) -> dict[str, Any]:
    """Serve requests that come at their times: those that have come, in one batch until all are done.

    Returns: what each request was answered and when, in seconds since the start, and the seconds in which
        there was nothing to do.
    """
    replies: list[list[int]] = []
    finished: list[float] = []
    idle = 0.0
    started = time.perf_counter()
    while len(replies) < len(arrivals):
        coming = arrivals[len(replies) :]
        now = time.perf_counter() - started
        batch = [arrival for arrival in coming[: hooked.batch] if arrival["at"] <= now]
        if not batch:
            idle += (pause := coming[0]["at"] - now)
            time.sleep(pause)
            continue
        replies += _generate(hooked, batch)
        finished += [time.perf_counter() - started] * len(batch)
    return {"replies": replies, "finished": finished, "idle": idle}


@torch.inference_mode()
def _generate(hooked: _Hooked, batch: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Greedy answers, each cut to the length that was asked for."""
    width = max(len(arrival["prompt"]) for arrival in batch)
    missing = [width - len(arrival["prompt"]) for arrival in batch]
    ids = torch.tensor([[0] * n + one["prompt"] for n, one in zip(missing, batch, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (width - n) for n in missing])
    hooked.hook.set_plans([arrival["steering"] for arrival in batch])
    longest = max(arrival["output"] for arrival in batch)
    tokens = hooked.model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=longest, do_sample=False
    )
    return [row[: one["output"]] for row, one in zip(tokens[:, width:].tolist(), batch, strict=True)]


if __name__ == "__main__":
    work(start)
