"""Ending a request at the position where a condition holds, wherever the schedule has got to by then.

The worker hands the step's fires on with its output. Before the scheduler reads that output, the tokens
behind the position are cut and the request is ended as an abort whose stop reason is `MARKER`, which the
front end turns into "content_filter" (see `ending_shown`). A request that ends by itself at a token that is
kept, ends by itself: without speculation the condition would never have been asked about that token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from typing import TYPE_CHECKING, Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.request import RequestStatus

from .attach import attached_to_runner
from .seams import wrap

if TYPE_CHECKING:
    from steerserve.runtime import Runtime

__all__ = ["MARKER", "EndingOutput", "install", "install_v2", "with_aborts"]

MARKER = "steerserve:content_filter"

_ABORTS = "_steerserve_aborts"
_installed: set[str] = set()


def install() -> None:
    """Wrap the scheduler and the V1 runner; harmless when called again. `register` does, in every process."""
    _install("update_from_output", _wrap_update_from_output)
    _install("sample_tokens", _wrap_sample_tokens)


def install_v2() -> None:
    """Wrap the V2 runner once its seams are checked, in a worker that uses it; harmless when called again."""
    _install("sample_tokens_v2", _wrap_sample_tokens)


def _install(name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    if name not in _installed:
        _installed.add(name)
        wrap(name, make)


# In the worker.


def _wrap_sample_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        output = original(self, grammar_output)
        attached = attached_to_runner(self)
        if attached is None:
            return output
        return with_aborts(output, attached.runtime) if attached.runtime.may_abort else output

    return sample_tokens


def with_aborts(output: Any, runtime: Runtime) -> Any:
    """The output of a step, whichever kind it is, carrying the step's fires to the scheduler."""
    if isinstance(output, AsyncModelRunnerOutput):
        # The runtime is in the next step by the time that this output is read.
        from steerserve.steer.crossing import arriving

        return EndingOutput(output, arriving(runtime.notes(), copy(runtime).aborts_of))
    return _carry(output, runtime.aborts()) if isinstance(output, ModelRunnerOutput) else output


class EndingOutput(AsyncModelRunnerOutput):
    """A step's output that is still on its way from the device, and its fires with it.

    Args:
        output: vLLM's own.
        aborts: gives request id → position; called once `output` has arrived.
    """

    def __init__(self, output: Any, aborts: Callable[[], Mapping[str, int]]) -> None:
        self._output = output
        self._aborts = aborts

    def get_output(self) -> Any:
        """As vLLM's: waits, and is called once."""
        return _carry(self._output.get_output(), self._aborts())


def _carry(output: Any, aborts: Mapping[str, int]) -> Any:
    if not aborts:
        return output
    # Of an empty step vLLM hands out one object again and again.
    carrying = copy(output)
    setattr(carrying, _ABORTS, dict(aborts))
    return carrying


# In the engine core.


def _wrap_update_from_output(original: Callable[..., Any]) -> Callable[..., Any]:
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        aborts = getattr(model_runner_output, _ABORTS, None)
        if not aborts:
            return original(self, scheduler_output, model_runner_output)
        ends = list(_ends(self, model_runner_output, aborts))
        for request, position in ends:
            _forget_from(self.kv_cache_manager, request.request_id, position)
        heard = [r for r, position in ends if _cut(model_runner_output, r, position)]
        silent = [r for r, _ in ends if r not in heard]
        last = [(r.client_index, _last_output(self, r)) for r in silent]
        _finish(self, silent)
        outputs = original(self, scheduler_output, model_runner_output)
        # A natural end among the tokens that were kept has come first.
        heard = [r for r in heard if not r.is_finished()]
        last += [(r.client_index, _marked(self, r, outputs)) for r in heard]
        _finish(self, heard)
        for client, output in last:
            _deliver(outputs, client, output)
        return outputs

    return update_from_output


def _ends(scheduler: Any, output: Any, aborts: Mapping[str, int]) -> Iterator[tuple[Any, int]]:
    """Requests, and the last position whose token each may keep."""
    for request_id, position in aborts.items():
        request = scheduler.requests.get(request_id)
        if request is not None and not request.is_finished() and position < _standing(output, request):
            yield request, position


def _forget_from(manager: Any, request_id: str, position: int) -> None:
    """Take the request's blocks from this position on out of the prefix cache, while they are its own.

    What ended this request would not be asked about tokens that another one reads from there.
    """
    groups = manager.kv_cache_config.kv_cache_groups
    for group, blocks in zip(groups, manager.get_block_ids(request_id), strict=True):
        manager.evict_blocks(set(blocks[position // group.kv_cache_spec.block_size :]))


def _sampled(output: Any, request: Any) -> list[int]:
    index = output.req_id_to_index.get(request.request_id)
    if index is None or not output.sampled_token_ids:
        return []
    tokens: list[int] = output.sampled_token_ids[index]
    return tokens


def _standing(output: Any, request: Any) -> int:
    """How many tokens that this step computed on are the request's own, and not drafts that were rejected."""
    stale = request.drop_stale_output and request.num_stale_output_tokens > 0
    accepted = 0 if stale else max(0, len(_sampled(output, request)) - 1)
    return int(request.num_tokens) + accepted


def _cut(output: Any, request: Any, position: int) -> bool:
    """Drop the tokens behind the position; whether any are left to deliver."""
    tokens = _sampled(output, request)
    del tokens[max(0, position + 1 - request.num_tokens) :]
    return bool(tokens)


def _finish(scheduler: Any, requests: list[Any]) -> None:
    scheduler.finish_requests([r.request_id for r in requests], RequestStatus.FINISHED_ABORTED)


def _last_output(scheduler: Any, request: Any) -> Any:
    """An output without tokens, of a request that is still there."""
    stats = request.take_prefill_stats()
    if stats is not None:
        stats.finalize(scheduler.kv_cache_manager.estimate_cached_tokens(request))
    return EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=[],
        finish_reason=FinishReason.ABORT,
        stop_reason=MARKER,
        events=request.take_events(),
        prefill_stats=stats,
        trace_headers=request.trace_headers,
        spec_decode_metrics=request.spec_decode_metrics,
    )


def _marked(scheduler: Any, request: Any, outputs: Any) -> Any:
    """The output that vLLM has made of the tokens that were kept, as the last one."""
    said = outputs[request.client_index].outputs if request.client_index in outputs else []
    for output in said:
        if output.request_id == request.request_id:
            said.remove(output)
            output.finish_reason, output.stop_reason = FinishReason.ABORT, MARKER
            output.spec_decode_metrics = request.spec_decode_metrics
            return output
    return _last_output(scheduler, request)


def _deliver(outputs: Any, client: int, output: Any) -> None:
    if client not in outputs:
        outputs[client] = EngineCoreOutputs()
    outputs[client].outputs.append(output)
