"""Continuations of prompts under steering, and what the unsteered model thinks of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .hooked import HookedModel

__all__ = ["Request", "continuations", "nats"]

# Requests generated at once; their logits are kept for the last position only.
BATCH = 128


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt, and what is added to the stream of each of its ordinary tokens and of those that follow.

    Attributes:
        prompt: token ids.
        vector: [d] float32, or None to leave the model alone.
    """

    prompt: list[int]
    vector: Tensor | None = None


@torch.no_grad()
def continuations(
    model: HookedModel,
    requests: Sequence[Request],
    *,
    tokens: int,
    temperature: float,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The ids that follow each prompt, up to the first special token.

    A steered request is what the server does for `{"op": "add"}` on all ordinary tokens, which is its
    default window; requests of one batch are steered each by its own vector.

    Args: temperature: 0 takes the likeliest token. progress: told how many requests each batch had.
    """
    out: list[list[int]] = []
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(requests), BATCH):
            part = requests[start : start + BATCH]
            out += _generate(model, part, tokens, temperature)
            if progress is not None:
                progress(len(part))
    return out


@torch.no_grad()
def nats(model: HookedModel, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """−log p of each continuation behind its context, in nats per token; NaN for an empty one.

    Args: pairs: (context, continuation), both token ids; no context is empty.
    """
    out: list[float] = []
    size = model.rows_at_once(max((len(context) + len(told) for context, told in pairs), default=1))
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        ids, mask = model.batch([context + continuation for context, continuation in part])
        logprobs = model.logits(ids, mask)[:, :-1].log_softmax(-1)
        told = logprobs.gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2).double()
        for row, (context, continuation) in enumerate(part):
            # The token at position p is predicted at p − 1.
            first = len(context) - 1
            out.append(-float(told[row, first : first + len(continuation)].mean()))
    return out


def _generate(
    model: HookedModel, part: Sequence[Request], tokens: int, temperature: float
) -> list[list[int]]:
    ids, mask = model.batch([request.prompt for request in part], left=True)
    none = torch.zeros(model.width)
    vectors = torch.stack([none if request.vector is None else request.vector for request in part])
    vectors = vectors.to(model.device).unsqueeze(1)

    def add(stream: Tensor, ordinary: Tensor) -> Tensor:
        return torch.where(ordinary.unsqueeze(-1), stream + vectors, stream)

    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    steered = any(request.vector is not None for request in part)
    with model.edited(add if steered else None):
        output = model.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            pad_token_id=model.pad,
            **(sampled if temperature > 0 else {"do_sample": False}),
        )
    return [_until_special(model, row) for row in output[:, ids.shape[1] :].tolist()]


def _until_special(model: HookedModel, row: list[int]) -> list[int]:
    end = next((at for at, token in enumerate(row) if token in model.special), len(row))
    return row[:end]
