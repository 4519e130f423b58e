"""Requests that come over time: random prompts of mixed lengths, mixed answers, Poisson arrivals."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .workload import FIRST_TOKEN, draw_plan

__all__ = ["Traffic", "make_arrivals", "steered_tokens", "unsteered"]

Arrival = dict[str, Any]


@dataclass(frozen=True)
class Traffic:
    """What comes in one turn: `rate` requests a second, with `prompt` and `output` tokens from … to …."""

    requests: int = 64
    plans: int = 32
    rows: int = 8
    rate: float = 8.0
    prompt: tuple[int, int] = (8, 128)
    output: tuple[int, int] = (16, 128)


def make_arrivals(traffic: Traffic, *, vocab: int, d_sae: int, seed: str) -> list[Arrival]:
    """Requests in the order in which they come, every one steered; no other seed repeats a prompt.

    Returns: for each its second `at`, `prompt`, tokens of `output`, and `steering`; plain values, for they
        travel as JSON.
    """
    drawing = random.Random("plans")
    plans = [draw_plan(drawing, traffic.rows, 1, d_sae, report=False) for _ in range(traffic.plans)]
    rng = random.Random(seed)
    at, arrivals = 0.0, []
    for i in range(traffic.requests):
        prompt = [rng.randrange(FIRST_TOKEN, vocab) for _ in range(rng.randint(*traffic.prompt))]
        output, steering = rng.randint(*traffic.output), plans[i % len(plans)]
        arrivals.append({"at": at, "prompt": prompt, "output": output, "steering": steering})
        at += rng.expovariate(traffic.rate)
    return arrivals


def unsteered(arrivals: Sequence[Arrival]) -> list[Arrival]:
    """The same requests with no plan."""
    return [arrival | {"steering": None} for arrival in arrivals]


def steered_tokens(arrivals: Sequence[Arrival]) -> int:
    """Tokens × rows that must be counted: all but each last token, which is never computed."""
    return sum(
        len(arrival["steering"]["interventions"]) * (len(arrival["prompt"]) + arrival["output"] - 1)
        for arrival in arrivals
        if arrival["steering"]
    )
