"""Seeded requests whose prompt is computed in chunks, on the CPU, under the V1 runner.

vLLM 0.32 samples a token for every request of a step, also for one whose prompt has not been read to its end;
it throws that token away and winds the request's generator back by `set_offset(get_offset() - 4)`, which only
generators on a GPU can do: torch refuses ("CPU Generator does not use offset"), and the engine ends
(`GPUModelRunner._bookkeeping_sync`). Here such a request's generator is out of sight while the step samples:
the token that is thrown away is drawn from the process's own generator, and the request's own draws its first
number for the first token that counts, as it does for a prompt that is computed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .attach import attached_to
from .seams import wrap

__all__ = ["install"]


def install() -> None:
    """Wrap the V1 runner's sampling."""
    wrap("sample_tokens", _wrap_sample_tokens)


def _wrap_sample_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        if attached_to(self) is None or self.device.type != "cpu":
            return original(self, grammar_output)
        with _out_of_sight(self):
            return original(self, grammar_output)

    return sample_tokens


@contextmanager
def _out_of_sight(runner: Any) -> Iterator[None]:
    """Without the generators of requests whose sampled token is thrown away; no request moves meanwhile."""
    generators: dict[int, Any] = runner.input_batch.generators
    thrown_away = np.flatnonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs])
    kept = {index: generators.pop(index) for index in thrown_away.tolist() if index in generators}
    try:
        yield
    finally:
        generators.update(kept)
