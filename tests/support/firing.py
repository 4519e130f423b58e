"""Lets a worker's runtime fire where a test says, whatever the activations: what `ending` is told, alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from steerserve_vllm.attach import attached_to_runner

__all__ = ["EXTENSION", "Firing"]

EXTENSION = "tests.support.firing.Firing"

# Of a worker: nothing here is shared with the test that asks.
_POSITIONS: dict[str, list[int]] = {}
_EXPECTED: dict[str, list[int]] = {}
_FIRED: dict[str, int] = {}
_COMPUTED: dict[str, int] = {}


class Firing:
    """A `worker_extension_cls`, asked over `collective_rpc`."""

    model_runner: Any

    def fire(self, positions: dict[str, list[int]], expected: dict[str, list[int]]) -> None:
        """From now on, requests with these tickets fire, as often as these positions are computed.

        Args: expected: ticket → all tokens that the request will have; it fires on any other one.
        """
        for table, new in ((_POSITIONS, positions), (_EXPECTED, expected), (_FIRED, {}), (_COMPUTED, {})):
            table.clear()
            table.update(new)  # type: ignore[attr-defined]
        attached = attached_to_runner(self.model_runner)
        assert attached is not None
        runtime: Any = attached.runtime
        if not hasattr(runtime, "fires"):
            runtime.__class__ = _firing(type(runtime))
            runtime.fires = {}

    def hold_fire(self) -> None:
        """Let the runtime decide for itself again."""
        attached = attached_to_runner(self.model_runner)
        assert attached is not None
        runtime: Any = attached.runtime
        if hasattr(runtime, "fires"):
            runtime.__class__ = type(runtime).__base__
            del runtime.fires

    def fired(self) -> dict[str, int]:
        """How often each ticket has, whether that ended a request or not."""
        return dict(_FIRED)

    def computed(self) -> dict[str, int]:
        """On how many tokens of each ticket's requests the model ran."""
        return dict(_COMPUTED)


def _firing(base: type[Any]) -> type[Any]:
    class FiringRuntime(base):
        may_abort = property(lambda self: True, lambda self, value: None)

        def begin_step(self, request_ids: Any, *args: Any, **kwargs: Any) -> None:
            super().begin_step(request_ids, *args, **kwargs)
            self.fires = {}
            for request_id, start, tokens in _computed(request_ids, *args):
                request = self._requests.get(request_id)
                if request is None:
                    continue
                _COMPUTED[request.ticket] = _COMPUTED.get(request.ticket, 0) + len(tokens)
                fired = [start + i for i, token in enumerate(tokens) if _fires_at(request, start + i, token)]
                if fired:
                    self.fires[request_id] = fired[0]
                    _FIRED[request.ticket] = _FIRED.get(request.ticket, 0) + 1

        def notes(self) -> torch.Tensor:
            fires = [self.fires.get(request_id, -1) for request_id in self._batch_ids]
            return torch.tensor(fires, dtype=torch.int64)

        def aborts_of(self, notes: torch.Tensor) -> dict[str, int]:
            pairs = zip(self._batch_ids, notes.tolist(), strict=True)
            return {request_id: position for request_id, position in pairs if position >= 0}

        def aborts(self) -> dict[str, int]:
            return self.aborts_of(self.notes())

    return FiringRuntime


def _fires_at(request: Any, position: int, token: int) -> bool:
    expected = _EXPECTED.get(request.ticket, [])
    wrong = position < len(expected) and expected[position] != token
    return wrong or position in _POSITIONS.get(request.ticket, [])


def _computed(request_ids: Any, *args: Any) -> list[tuple[str, int, list[int]]]:
    """Of each request in the step: the first position that it computes, and its tokens from there."""
    if isinstance(args[0], np.ndarray):
        scheduled, computed, tokens = (np.asarray(each) for each in args[:3])
        ends = np.cumsum(scheduled)
        starts = ends - scheduled
    else:
        bounds, positions, tokens = (each.cpu().numpy() for each in args[:3])
        starts, ends = bounds[:-1], bounds[1:]
        computed = positions[np.minimum(starts, len(positions) - 1)]
    return [
        (request_id, int(c), tokens[a:b].tolist())
        for request_id, a, b, c in zip(request_ids, starts, ends, computed, strict=False)
    ]
