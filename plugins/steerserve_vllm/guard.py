"""Before an engine serves, one forward pass in which every hook point is looked at, as it runs here.

Each has to be reached once, with a row for every token, and ranks that share a layer have to see one stream.
A model whose layers split the tokens between ranks, or hand on partial sums for a later layer to reduce,
would be steered wrongly in silence: each rank would compute another activation, or none at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.parallel_state import get_tp_group

from steerserve.errors import IncompatibleError
from steerserve.hookpoint import HookPoint

from .attach import attached_to, attached_to_runner
from .compat import TENSOR_PARALLEL_MODELS
from .op import watching

__all__ = ["Sight", "check_model", "check_stream", "guarded"]

# Few, for a CPU; and one that no usual number of ranks divides, as its parts would be as long as it.
_TOKENS = 11
# Of its mean size. Ranks that reduce agree to the last bit, or nearly; partial sums do not at all.
_TOLERANCE = {torch.float32: 1e-3}
_TOLERANCE_OF_HALF = 1e-2


@dataclass(frozen=True)
class Sight:
    """What the op was given at one hook point: the two parts of the stream, on the host."""

    stream: Tensor
    addend: Tensor | None


def guarded(worker: Any) -> Callable[[], Any]:
    """The worker's `compile_or_warm_up_model`, which then begins by looking at every hook point.

    It is the first call after the weights and the cache are there, and comes before any graph is captured.
    """
    original = worker.compile_or_warm_up_model

    def compile_or_warm_up_model() -> Any:
        check_model(worker.model_runner)
        return original()

    return compile_or_warm_up_model


def check_model(runner: Any) -> None:
    """Run the model once on a few tokens, and look at the stream at every hook point.

    Args: runner: a worker's model runner, of either kind, with the model loaded.
    Raises: IncompatibleError naming the hook point, if the stream there is not what the op needs.
    """
    attached = attached_to_runner(runner)
    if attached is None or not attached.points:
        return
    group, model = get_tp_group(), runner.get_model()
    if group.world_size > 1:
        _check_classes(model)
    seen: dict[int, list[Sight]] = {point: [] for point in attached.points}

    def see(point: int, stream: Tensor, addend: Tensor | None) -> None:
        kept = addend.detach().to("cpu", copy=True) if addend is not None else None
        seen.setdefault(point, []).append(Sight(stream.detach().to("cpu", copy=True), kept))

    with _fed(model, runner) as tokens, _without_attention(model), watching(see), torch.inference_mode():
        _run(runner, min(_TOKENS, runner.max_num_tokens))
    check_stream(seen, tokens[0], attached.points, group.cpu_group)


def _run(runner: Any, tokens: int) -> None:
    """A forward pass as vLLM runs it to measure memory: without attention, and not from a graph."""
    if attached_to(runner) is not None:
        _make_intermediates(runner)
        runner._dummy_run(tokens, is_profile=True, skip_eplb=True)
    else:
        runner._dummy_run(tokens, is_profile=True, skip_attn=True, skip_eplb=True)


def _make_intermediates(runner: Any) -> None:
    """Where this is not the first pipeline stage, and nothing has run yet: what its model is given."""
    from vllm.distributed.parallel_state import get_pp_group

    if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
        runner.intermediate_tensors = runner.get_model().make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )


def _check_classes(model: nn.Module) -> None:
    """Also what a model of several parts builds by its configuration is one of vLLM's classes."""
    classes = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    for name in sorted(classes & TENSOR_PARALLEL_MODELS.keys()):
        raise IncompatibleError(
            f"expected another model, or one rank: {name}: {TENSOR_PARALLEL_MODELS[name]}"
        )


@contextmanager
def _fed(model: nn.Module, runner: Any) -> Iterator[list[int]]:
    """Give the model something to compute on in place of vLLM's zeros, and the same on every rank.

    Yields: how many tokens it was given, once it has run.
    """
    counted: list[int] = []
    vocab = runner.model_config.get_vocab_size()

    def feed(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        counted[:] = [int(kwargs["positions"].shape[-1])]
        given = dict(kwargs)
        if given.get("input_ids") is not None:
            ids = given["input_ids"]
            spread = torch.arange(ids.numel(), device=ids.device) * 7919 + 13
            given["input_ids"] = (spread % vocab).to(ids.dtype).view_as(ids)
        if given.get("inputs_embeds") is not None:
            given["inputs_embeds"] = _pattern(given["inputs_embeds"])
        if given.get("intermediate_tensors") is not None:
            handed = given["intermediate_tensors"]
            given["intermediate_tensors"] = type(handed)({n: _pattern(t) for n, t in handed.items()})
        return args, given

    handle = model.register_forward_pre_hook(feed, with_kwargs=True)
    try:
        yield counted
    finally:
        handle.remove()
    if not counted:
        raise IncompatibleError("expected the profiling pass to call the model, which it did not")


@contextmanager
def _without_attention(model: nn.Module) -> Iterator[None]:
    """Let attention add nothing, as it has nothing to attend to.

    vLLM's CPU backend leaves what it would write as it was allocated: whatever memory held, which may be
    so large, or so much of no number, that no difference between ranks shows beside it.
    """
    parts: list[Any] = [getattr(module, "impl", None) for module in model.modules()]
    changed = list({id(impl): impl for impl in parts if hasattr(impl, "forward")}.values())
    for impl in changed:
        impl.forward = _zeroed(impl.forward)
    try:
        yield
    finally:
        for impl in changed:
            del impl.forward


def _zeroed(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        for tensor in (result, kwargs.get("output")):
            if isinstance(tensor, Tensor):
                tensor.zero_()
        return result

    return forward


def _pattern(like: Tensor) -> Tensor:
    """Numbers of the size of an embedding, all different, of this shape."""
    numbers = torch.arange(like.numel(), dtype=torch.float32, device=like.device)
    return (numbers * 0.7).cos().view_as(like).to(like.dtype)


def check_stream(
    seen: Mapping[int, Sequence[Sight]], tokens: int, points: Sequence[int], group: Any = None
) -> None:
    """Hold what was seen at the hook points to what the op needs.

    Args:
        seen: by the index of the hook point, what the op was given there, each time that it was reached.
        tokens: how many the model was given.
        points: where the op was put.
        group: the process group of the ranks that share these layers.
    Raises: IncompatibleError on every rank, if it is not so on any of them.
    """
    ranks = torch.distributed.get_world_size(group) if group is not None else 1
    shapes = torch.tensor([_shape(seen.get(point, ())) for point in sorted({*points, *seen})])
    for rank, found in enumerate(_gathered(shapes, group, ranks)):
        for point, (times, rows, added) in zip(sorted({*points, *seen}), found.tolist(), strict=True):
            _check_shape(point, rank, times, rows, added, tokens)
    for point in sorted(points) if ranks > 1 else ():
        (sight,) = seen[point]
        parts = [part for part in (sight.stream, sight.addend) if part is not None]
        compared = [_check_same(point, part, group, ranks) for part in parts]
        if not any(compared):
            raise IncompatibleError(
                f"expected the profiling pass to carry something, at {HookPoint(point).name} the stream is "
                "zero: whether tensor-parallel ranks see the same one cannot be told"
            )


def _shape(sights: Sequence[Sight]) -> tuple[int, int, int]:
    """How often a point was reached, and the rows of both parts there; −1 for a second that is not there."""
    if not sights:
        return 0, 0, -1
    last = sights[-1]
    return len(sights), len(last.stream), len(last.addend) if last.addend is not None else -1


def _check_shape(point: int, rank: int, times: int, rows: int, added: int, tokens: int) -> None:
    where = f"at {HookPoint(point).name}, on tensor-parallel rank {rank}"
    if times != 1:
        raise IncompatibleError(
            f"expected the forward pass to reach each hook point once, it did so {times} times {where}"
        )
    if rows != tokens or added not in (-1, tokens):
        got = rows if rows != tokens else added
        raise IncompatibleError(
            f"expected a row of the stream for each of {tokens} tokens, got {got} {where}: this model, or a "
            "setting of the engine, splits the tokens or leaves some of them out"
        )


def _check_same(point: int, part: Tensor, group: Any, ranks: int) -> bool:
    """Whether there was anything to compare: a first layer may add nothing."""
    first, *others = _gathered(part.float().contiguous(), group, ranks)
    size = float(first.nan_to_num().abs().mean())
    if size == 0:
        return False
    tolerance = _TOLERANCE.get(part.dtype, _TOLERANCE_OF_HALF)
    for rank, other in enumerate(others, 1):
        apart = float((other.nan_to_num() - first.nan_to_num()).abs().mean()) / size
        # Nor may what is no number pass for agreement.
        if not apart <= tolerance:
            raise IncompatibleError(
                f"expected {ranks} tensor-parallel ranks to see one stream, at {HookPoint(point).name} rank "
                f"{rank} sees another than rank 0 (by {apart:.3g} of its mean size): this model's layers "
                "hand on partial sums, or parts of the stream"
            )
    return True


def _gathered(tensor: Tensor, group: Any, ranks: int) -> list[Tensor]:
    """This rank's tensor and those of the others, in their order."""
    if ranks == 1:
        return [tensor]
    every = [torch.empty_like(tensor) for _ in range(ranks)]
    torch.distributed.all_gather(every, tensor, group=group)
    return every
