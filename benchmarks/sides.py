"""Two ways of serving the same arrivals, in turns: steerserve in vLLM, and transformers with a hook."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .agreement import agreement
from .arrivals import Arrival, Traffic, make_arrivals, steered_tokens, unsteered
from .child import Child
from .latency import TimedTurn
from .rounds import order
from .settings import Setup, core_environment, vllm_setup
from .shapes import Served

__all__ = ["BASE", "SIDES", "Side", "check", "play", "running"]

Advance = Callable[[str], None]


@dataclass(frozen=True)
class Side:
    """One way of serving: by which process, and whether its requests are steered."""

    name: str
    process: str
    steered: bool = True

    def serve(self, children: Mapping[str, Child], arrivals: list[Arrival]) -> dict[str, Any]:
        """Raises: RuntimeError if steerserve steered any other number of tokens than the plans name."""
        own = arrivals if self.steered else unsteered(arrivals)
        result = children[self.process].turn({"arrivals": own})
        expected = steered_tokens(own)
        if result.get("steered", expected) != expected:
            raise RuntimeError(f"{self.name}: expected steered = {expected}, got {result['steered']}")
        return result


OURS = Side("steerserve", "vllm")
THEIRS = Side("hf_hook", "hf")
PLAIN = Side("hf_plain", "hf", steered=False)
SIDES = (OURS, THEIRS, PLAIN)
BASE = THEIRS.name


@contextmanager
def running(
    served: Served, dtype: str, batch: int, folder: Path, starting: Advance
) -> Iterator[tuple[dict[str, Child], dict[str, Any]]]:
    """Both processes on all cores, and what they say of themselves.

    Args:
        batch: the most requests that transformers takes at once.
        starting: told each process before it is started.
    """
    own = replace(served, engine={**served.engine, "dtype": dtype})
    setups = {"vllm": vllm_setup(own, 1, core_environment(0)), "hf": _hf_setup(own, dtype, batch)}
    children: dict[str, Child] = {}
    descriptions: dict[str, Any] = {}
    with ExitStack() as stack:
        for name, setup in setups.items():
            starting(f"starting {name}, {dtype}")
            child = stack.enter_context(Child(setup, folder / f"{name}-{dtype}.log"))
            children[name], descriptions[name] = child, child.wait_until_ready()
        yield children, descriptions


def play(
    children: Mapping[str, Child], served: Served, traffic: Traffic, rounds: int, advance: Advance
) -> tuple[list[TimedTurn], list[dict[str, float]]]:
    """A short round to warm up, which is not kept, and `rounds` that are, the same requests for every side.

    Returns: the turns, and for each round how far steerserve and transformers agree.
    """
    turns, agreements = [], []
    for number in range(-1, rounds):
        size = traffic if number >= 0 else replace(traffic, requests=min(8, traffic.requests))
        arrivals = make_arrivals(size, vocab=served.shape.vocab, d_sae=served.d_sae, seed=f"round {number}")
        replies = {}
        for side in order(SIDES, max(number, 0)):
            advance(side.name)
            result = side.serve(children, arrivals)
            replies[side.name] = result["replies"]
            turns += [TimedTurn.of(number, side.name, arrivals, result)] if number >= 0 else []
        agreements += [agreement(replies[OURS.name], replies[BASE])] if number >= 0 else []
    return turns, agreements


def check(
    children: Mapping[str, Child], served: Served, traffic: Traffic, advance: Advance
) -> dict[str, Any]:
    """How far both agree on a few requests, steered and not, and how much steering changed.

    Returns: `agreement` of the steered answers, of the unsteered ones, and of transformers' steered with its
        unsteered ones; and how many tokens the steered answers have, and how many different ones.
    """
    arrivals = make_arrivals(traffic, vocab=served.shape.vocab, d_sae=served.d_sae, seed="check")
    sides = (OURS, THEIRS, Side("vllm_plain", "vllm", steered=False), PLAIN)
    replies = []
    for side in sides:
        advance(f"{side.name}, checking")
        replies.append(side.serve(children, arrivals)["replies"])
    ours, theirs, ours_plain, theirs_plain = replies
    return {
        "requests": len(arrivals),
        "tokens": sum(map(len, theirs)),
        "different_tokens": len(set().union(*theirs)),
        "steered": agreement(ours, theirs),
        "unsteered": agreement(ours_plain, theirs_plain),
        "steered_and_unsteered": agreement(theirs, theirs_plain),
    }


def _hf_setup(served: Served, dtype: str, batch: int) -> Setup:
    options = {
        "model": str(served.model),
        "sae": str(served.saes[0]),
        "layer": served.shape.layers[0],
        "dtype": dtype,
        "threads": len(os.sched_getaffinity(0)),
        "batch": batch,
    }
    return Setup("benchmarks.full_encode", options, {})
