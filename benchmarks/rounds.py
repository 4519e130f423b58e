"""Turns: every variant once a round, in an order that changes, so that drift of the machine favours none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from .child import Child
from .shapes import Served
from .summary import Turn
from .workload import Load, Variant, make_batch

__all__ = ["order", "play"]

Played = TypeVar("Played")


def order(variants: Sequence[Played], number: int) -> list[Played]:
    """The order of a round: rotated by one every second round, and backwards in odd ones."""
    shift = (number // 2) % len(variants)
    turned = [*variants[shift:], *variants[:shift]]
    return turned[::-1] if number % 2 else turned


def play(
    children: Mapping[str, Child],
    variants: Sequence[Variant],
    served: Served,
    load: Load,
    rounds: int,
    advance: Callable[[str], None],
) -> list[Turn]:
    """A round to warm up, which is not kept, and `rounds` that are.

    Args: advance: told the variant before each turn.
    Raises: RuntimeError if a turn did not do what it is named for: it steered too much or too little, or
        found prompts in the cache.
    """
    turns: list[Turn] = []
    for number in range(-1, rounds):
        for variant in order(variants, max(number, 0)):
            advance(variant.name)
            seeds = [f"{variant.name}/{number}/{i}" for i in range(load.batches)]
            batches = [
                make_batch(variant, load, vocab=served.shape.vocab, d_sae=served.d_sae, seed=seed).wire
                for seed in seeds
            ]
            result = children[variant.engine].turn({"batches": batches})
            _check(variant, load, result)
            turn = Turn(number, variant.name, result["seconds"], result["tokens"], result["steered"])
            turns += [turn] if number >= 0 else []
    return turns


def _check(variant: Variant, load: Load, result: Mapping[str, Any]) -> None:
    expected = {
        "tokens": load.batches * load.requests * load.output,
        "cached": 0,
        "steered": variant.steered(load),
    }
    for name, value in expected.items():
        if result[name] != value:
            raise RuntimeError(f"{variant.name}: expected {name} = {value}, got {result[name]}")
