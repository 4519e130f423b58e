"""Note, steer and hold: the CPU's loops and the GPU's kernels do to a step what the reference does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steerserve.steer import NEVER, PointBuffers
from tests.unit.steer.staged import (
    EVERY_OP,
    Step,
    by_cpu,
    by_reference,
    by_triton,
    random_step,
    staged_buffers,
)

Op = Callable[[PointBuffers, Step], Step]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SHAPES = [(32, 1, 7), (64, 6, 24), (100, 20, 24), (256, 33, 12), (96, 64, 8), (64, 128, 6)]
BY_TRITON = [
    pytest.param(*shape, dtype, by_triton, marks=pytest.mark.interpreted)
    for shape in SHAPES
    for dtype in (torch.float32, torch.bfloat16)
]
BY_CPU = [(*shape, dtype, by_cpu) for shape in SHAPES for dtype in TOLERANCE]


def hold_to_the_reference(op: Op, buffers: PointBuffers, step: Step) -> Step:
    """Compare all that the stages change. Returns: what the reference made of the step."""
    expected, got = by_reference(buffers, step), op(buffers, step)
    tolerance = TOLERANCE[step.stream.dtype]
    assert torch.equal(got.rows, expected.rows)
    assert torch.equal(got.history.since, expected.history.since)
    torch.testing.assert_close(got.trace, expected.trace, rtol=1e-4, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(got.stream, expected.stream, rtol=tolerance, atol=tolerance)
    assert torch.equal(got.stream[step.slot < 0], step.stream[step.slot < 0])
    return expected


@pytest.mark.parametrize("two_parts", [True, False], ids=["residual", "one tensor"])
@pytest.mark.parametrize(("width", "rows", "tokens", "dtype", "op"), BY_CPU + BY_TRITON)
def test_all_stages_are_the_reference(
    width: int, rows: int, tokens: int, dtype: torch.dtype, op: Op, two_parts: bool
) -> None:
    buffers = staged_buffers(4, rows, width, seed=width + rows)
    step = random_step(buffers, tokens, dtype, two_parts=two_parts, seed=rows)
    hold_to_the_reference(op, buffers, step)


# Always the same examples: once in a thousand runs, an activation would lie within rounding of its threshold.
@settings(max_examples=300, derandomize=True)
@given(
    width=st.integers(16, 80),
    rows=st.integers(1, 40),
    tokens=st.integers(0, 30),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_loops_are_the_reference_for_any_step(
    width: int, rows: int, tokens: int, seed: int, dtype: torch.dtype
) -> None:
    buffers = staged_buffers(5, rows, width, seed)
    step = random_step(buffers, tokens, dtype, two_parts=bool(seed % 2), seed=seed)
    hold_to_the_reference(by_cpu, buffers, step)


@pytest.mark.interpreted
@pytest.mark.parametrize("seed", range(12))
def test_the_kernels_are_the_reference_for_any_step(seed: int) -> None:
    buffers = staged_buffers(5, 1 + 2 * seed, 48, seed)
    step = random_step(buffers, seed % 7, torch.float32, two_parts=bool(seed % 2), seed=seed)
    hold_to_the_reference(by_triton, buffers, step)


def test_the_random_steps_reach_every_stage() -> None:
    noted = shut = held = 0
    for seed in range(20):
        buffers = staged_buffers(5, 20, 64, seed)
        step = random_step(buffers, 30, torch.float32, two_parts=True, seed=seed)
        after = by_reference(buffers, step)
        noted += int((after.history.since != step.history.since).sum())
        shut += int((after.rows != step.rows).sum())
        held += int((buffers.held[step.slot.clamp(min=0)] & (step.slot >= 0)).sum())
    assert min(noted, shut, held) > 50


@pytest.mark.parametrize("op", EVERY_OP)
def test_of_several_tokens_of_a_request_the_first_is_noted_and_later_ones_follow_it(op: Op) -> None:
    buffers = staged_buffers(2, 1, 32, seed=0)
    fire = _latch_on_itself(buffers)
    tokens = 9
    step = random_step(buffers, tokens, torch.float32, two_parts=False, seed=0)
    step.history.since.fill_(NEVER)
    step.history.table.fill_(2)
    step.history.position.copy_(torch.arange(40, 40 + tokens))
    step.slot.zero_()
    step.rows.fill_(-1)
    step.stream.zero_()
    step.stream[4] = step.stream[6] = fire
    after = op(buffers, step)
    assert after.history.since[2, int(buffers.row[0, 0])] == 44
    assert (after.history.since != NEVER).sum() == 1
    assert after.trace[:, 0, 0].isnan().tolist() == [True] * 4 + [False] * 5


@pytest.mark.parametrize("op", EVERY_OP)
def test_a_request_without_a_table_notes_nothing_and_never_latches(op: Op) -> None:
    buffers = staged_buffers(2, 1, 32, seed=0)
    fire = _latch_on_itself(buffers)
    step = random_step(buffers, 3, torch.float32, two_parts=False, seed=0)
    # What stands where a number of −1 would lead, were it taken for one.
    step.history.since.fill_(0)
    step.history.table.fill_(-1)
    step.slot.zero_()
    step.rows.fill_(-1)
    step.stream.copy_(fire.expand(3, -1))
    after = op(buffers, step)
    assert not after.history.since.any()
    assert torch.equal(after.stream, step.stream)


def _latch_on_itself(buffers: PointBuffers) -> torch.Tensor:
    """Slot 0 latches where its one feature is above 1. Returns: [d], a token where it is."""
    buffers.params[0, 0, :9] = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 2.0, -torch.inf, torch.inf])
    buffers.above[0, 0, 0], buffers.below[0, 0, 0], buffers.gated[0, 0] = 1.0, torch.inf, True
    buffers.state[0, 0], buffers.mode[0, 0] = 1, 1
    buffers.stateful[0], buffers.held[0] = True, False
    return 2.0 * buffers.encoder[0, 0]
