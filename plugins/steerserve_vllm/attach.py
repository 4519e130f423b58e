"""Putting steering into a worker: the runtime of its model, the op behind its layers, and what that costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from vllm.logger import init_logger

from steerserve.hookpoint import HookPoint

from .setup import catalog_for, check_engine, config_for, harvest_points

if TYPE_CHECKING:
    from steerserve.runtime import Runtime
    from steerserve.training.capture import Capture

__all__ = ["Attached", "attach", "attached_to", "attached_to_runner"]

_ATTRIBUTE = "_steerserve"

logger = init_logger("vllm.steerserve")


R = TypeVar("R", bound="Runtime")


@dataclass(frozen=True)
class Attached(Generic[R]):
    """What a worker holds: the steering state of its model, and what harvests there, if anything does."""

    runtime: R
    capture: Capture | None
    # Where the op was put, by the index of the hook point.
    points: tuple[int, ...] = ()


def attached_to(owner: Any) -> Attached[Any] | None:
    """What `attach` put on a model runner or model state; None where nothing is steered."""
    found: Attached[Any] | None = getattr(owner, _ATTRIBUTE, None)
    return found


def attached_to_runner(runner: Any) -> Attached[Any] | None:
    """The same of a worker's runner: V1's keeps it itself, V2's in its model state."""
    return attached_to(runner) or attached_to(getattr(runner, "model_state", None))


def attach(
    owner: Any, vllm_config: Any, model: Any, device: Any, open_runtime: Callable[..., R]
) -> Attached[R] | None:
    """Steer this model, once; None where steerserve is not configured.

    Args:
        owner: the model runner or model state, which keeps the result.
        open_runtime: makes the runtime that the owner drives; arguments as `Runtime`.
    Raises: IncompatibleError, ConfigError or CheckpointError saying what cannot be served exactly.
    """
    # Not at the top: numba must not be loaded while vLLM's CPU workers scan every module for kernels, and
    # model classes not before vLLM asks for them.
    from steerserve.training.capture import Capture

    from .layers import find_layers, hook_points, stop_behind
    from .op import bind

    if attached_to(owner) is not None:
        return attached_to(owner)
    catalog, config = catalog_for(vllm_config), config_for(vllm_config)
    if catalog is None or config is None:
        return None
    check_engine(vllm_config)
    layers = find_layers(model, catalog.n_layers)
    points = [point.index for point in catalog.points]
    harvest = config.harvest
    harvested = harvest_points(harvest, catalog.n_layers) if harvest is not None else {}
    points += harvested
    if harvested:
        stop_behind(layers, max(points))
    dtype = vllm_config.model_config.dtype
    here = hook_points(layers, points, catalog.d_model, dtype=dtype, device=device)
    scheduler = vllm_config.scheduler_config
    captured = vllm_config.compilation_config.cudagraph_capture_sizes or [0]
    runtime = open_runtime(
        catalog,
        [point for point in here if HookPoint(point) in catalog.points],
        max_requests=scheduler.max_num_seqs,
        max_tokens=max(scheduler.max_num_batched_tokens, *captured),
        vocab=vllm_config.model_config.get_vocab_size(),
        device=device,
    )
    _tell_cost(runtime)
    capture = None
    harvested_here = {point: hook for point, hook in harvested.items() if point in here}
    if harvested_here and _is_first_rank(vllm_config):
        capture = Capture(harvested_here, catalog.special_tokens)
    attached = Attached(runtime, capture, tuple(here))
    setattr(owner, _ATTRIBUTE, attached)
    bind(owner, runtime, capture)
    return attached


def _tell_cost(runtime: Runtime) -> None:
    for source, resident in zip(runtime.catalog.residents, runtime.residents, strict=True):
        if resident is not None:
            logger.info(
                "SAE `%s` is resident: %.1f MiB on %s, %.2f MFLOP for each token that needs it",
                source.name,
                resident.nbytes / 2**20,
                runtime.device,
                resident.flops_per_token / 1e6,
            )
    if runtime.buffers:
        logger.info(
            "steering at hook points %s: %d slots of up to %d rows, %.1f MiB on %s when all are in use",
            sorted(runtime.buffers),
            runtime.slots.capacity,
            runtime.catalog.rows_per_point,
            runtime.nbytes / 2**20,
            runtime.device,
        )


def _is_first_rank(vllm_config: Any) -> bool:
    """Tensor-parallel ranks see the same stream; one of them writes it."""
    parallel = vllm_config.parallel_config
    return int(parallel.rank) % int(parallel.tensor_parallel_size) == 0
