"""Nothing that a request does lifts a held feature above its ceiling, however the stream is read then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from steerserve.sae import FeatureRows
from steerserve.steer import NEVER, History, PointBuffers
from steerserve.steer.buffers import BASE, CEILING, EDIT, HOLD, NORM, z_bounds
from tests.support.scale import scaled_examples
from tests.unit.steer.staged import EVERY_OP, Step, by_cpu

INF = torch.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# a, c, lo, hi; a number in half precision has no room for the largest of them.
HOSTILE = [(1.0, 1e6), (1.0, -1e6), (1e3, 0.0), (0.0, 500.0), (-50.0, 0.0), (1.0, 3.0)]


@dataclass(frozen=True)
class Held:
    """One slot: the first `held` of its features are held, each at or under its `ceiling`."""

    buffers: PointBuffers
    features: FeatureRows
    ceiling: Tensor

    @property
    def held(self) -> int:
        """How many."""
        return len(self.ceiling)

    def above(self, x: Tensor) -> Tensor:
        """[tokens, held]: whether an activation of x lies above its ceiling. Args: x: [tokens, d]."""
        return self.features.activations(x)[:, : self.held] > self.ceiling


def random_held(
    seed: int, *, width: int = 64, held: int = 16, hostile: int = 16, likeness: float = 0.6
) -> Held:
    """A random SAE's features, and whatever a request may do to others of them.

    Args: likeness: how much of an encoder's row is its decoder's.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    n = held + hostile
    decoder = normalize(draw(n, width))
    encoder = (likeness * decoder + (1 - likeness) * normalize(draw(n, width))) * (0.5 + draw(n, 1).abs())
    kind = torch.randint(3, (n,), generator=generator)
    gated = kind == 2
    threshold = torch.where(kind == 0, 0.0, draw(n).abs())
    scale, shift = torch.where(gated, draw(n).exp(), 1.0), torch.where(gated, draw(n) * 0.5, 0.0)
    floor = torch.zeros(n)
    features = FeatureRows(encoder, draw(n) * 0.3, threshold, scale, shift, floor, decoder)
    ceiling = torch.where(torch.rand(held, generator=generator) < 0.6, 0.0, draw(held).abs())
    return _slot(
        features, ceiling, [HOSTILE[int(i)] for i in torch.randint(6, (hostile,), generator=generator)]
    )


def _slot(features: FeatureRows, ceiling: Tensor, hostile: list[tuple[float, float]]) -> Held:
    n, width = features.encoder.shape
    held, buffers = len(ceiling), PointBuffers(1, n, width)
    buffers.encoder[0], buffers.decoder[0] = features.encoder, features.decoder
    parts = (features.bias, features.threshold, features.scale, features.shift, features.floor)
    params = buffers.params[0]
    params[:, :5] = torch.stack(parts, dim=1)
    params[:held, 5:9] = torch.tensor([1.0, 0.0, -INF, INF])
    params[:held, 8] = ceiling
    # An ablation, as it is written.
    params[:held][ceiling == 0, 5:9] = torch.tensor([0.0, 0.0, -INF, INF])
    for k, (a, c) in enumerate(hostile):
        params[held + k, 5:9] = torch.tensor([a, c, -INF, INF])
    params[:, CEILING], params[:, BASE] = z_bounds(params)
    params[:, NORM] = features.encoder.square().sum(dim=1)
    buffers.above[0], buffers.below[0] = -INF, INF
    buffers.bit[0], buffers.condition[0] = 0, 0
    buffers.row[0] = torch.arange(n)
    buffers.mode[0] = torch.tensor([HOLD] * held + [EDIT] * (n - held))
    buffers.count[0], buffers.held[0] = n, True
    return Held(buffers, features, ceiling)


def step_of(
    held: Held, dtype: torch.dtype, *, two_parts: bool, tokens: int = 12, seed: int = 0, size: float = 4.0
) -> Step:
    """Tokens of one request; a row of the slot applies to each."""
    generator = torch.Generator().manual_seed(seed)
    width = held.buffers.encoder.shape[2]
    stream = (torch.randn(tokens, width, generator=generator) * size).to(dtype)
    addend = torch.randn(tokens, width, generator=generator).to(dtype) if two_parts else None
    slot, rows = torch.zeros(tokens, dtype=torch.int32), torch.ones(tokens, dtype=torch.int64)
    history = History(
        torch.arange(tokens, dtype=torch.int32), torch.arange(tokens), torch.full((tokens, 128), NEVER)
    )
    return Step(stream, addend, slot, rows, history, torch.zeros(tokens, held.buffers.bit.shape[1], 2))


def lost(after: Step) -> Tensor:
    """[tokens] whether the op says of a token that it could not be held."""
    return (after.history.since != NEVER).any(dim=1)


def readings(step: Step) -> list[Tensor]:
    """The stream as float32 sums, and as a model reads it that keeps the sum in the stream's own type."""
    exact = step.stream.float() if step.addend is None else step.stream.float() + step.addend.float()
    return [exact, exact.to(step.stream.dtype).float()]


def hold(op: Callable[[PointBuffers, Step], Step], held: Held, step: Step) -> int:
    """Assert that every token is held, or is said not to be. Returns: how many are said not to be."""
    after = op(held.buffers, step)
    for x in readings(after):
        assert not held.above(x)[~lost(after)].any()
    return int(lost(after).sum())


@pytest.mark.parametrize("two_parts", [True, False], ids=["residual", "one tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_held_stays_under_its_ceiling_and_nearly_always_can_be(
    dtype: torch.dtype, two_parts: bool
) -> None:
    tokens = failed = without = 0
    for seed in range(250):
        width, most = (64, 96, 128)[seed % 3], 1 + seed % 16
        held = random_held(seed, width=width, held=most, hostile=seed % 17, likeness=0.3 + seed % 5 / 10)
        step = step_of(held, dtype, two_parts=two_parts, seed=seed)
        failed += hold(by_cpu, held, step)
        tokens += len(step.slot)
        held.buffers.held[0] = False
        unheld = by_cpu(held.buffers, step)
        without += int(held.above(readings(unheld)[0]).any(dim=1).sum())
    assert failed <= tokens / 1000
    assert without > tokens / 2


# In float16, a number above 65504 is infinite: such a token is lost, and said to be.
@pytest.mark.parametrize("op", EVERY_OP)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_implementation_holds(dtype: torch.dtype, op: Callable[[PointBuffers, Step], Step]) -> None:
    for seed in range(2):
        held = random_held(seed, held=6, hostile=4)
        hold(op, held, step_of(held, dtype, two_parts=bool(seed % 2), seed=seed, tokens=2))


@scaled_examples(150, 40)
@given(
    seed=st.integers(0, 2**31),
    held=st.integers(1, 40),
    hostile=st.integers(0, 24),
    likeness=st.floats(0, 1),
    size=st.sampled_from([0.0, 1e-3, 1.0, 1e4]),
    dtype=st.sampled_from(DTYPES),
    two_parts=st.booleans(),
)
def test_a_token_above_a_ceiling_is_always_said_to_be_lost(
    seed: int, held: int, hostile: int, likeness: float, size: float, dtype: torch.dtype, two_parts: bool
) -> None:
    one = random_held(seed, width=32, held=held, hostile=hostile, likeness=likeness)
    hold(by_cpu, one, step_of(one, dtype, two_parts=two_parts, seed=seed, size=size, tokens=4))


def _directions(width: int, count: int, clamp: float, hostile: int = 0) -> Held:
    generator = torch.Generator().manual_seed(count)
    n = count + hostile
    unit = normalize(torch.randn(n, width, generator=generator))
    zero = torch.zeros(n)
    rows = FeatureRows(unit, zero, zero - INF, zero + 1, zero, zero - INF, unit)
    held = _slot(rows, torch.zeros(count), [HOSTILE[k % 6] for k in range(hostile)])
    params = held.buffers.params[0]
    params[:count, 6] = clamp
    params[:, CEILING], params[:, BASE] = z_bounds(params)
    return held


@pytest.mark.parametrize("hostile", [0, 5])
@pytest.mark.parametrize("two_parts", [True, False], ids=["residual", "one tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", EVERY_OP)
def test_a_direction_that_is_held_is_projected_out_within_rounding(
    op: Callable[[PointBuffers, Step], Step], dtype: torch.dtype, two_parts: bool, hostile: int
) -> None:
    held = _directions(128, 3, 0.0, hostile)
    step = step_of(held, dtype, two_parts=two_parts, tokens=4, seed=hostile)
    after = op(held.buffers, step)
    assert not lost(after).any()
    for x in readings(after):
        room = 4 * max(torch.finfo(dtype).eps, 2.0**-17) * torch.linalg.vector_norm(x, dim=1, keepdim=True)
        assert ((x @ held.features.encoder[:3].T).abs() <= room).all()


@pytest.mark.parametrize("op", EVERY_OP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_whose_held_features_are_far_from_active_keeps_its_bits(
    dtype: torch.dtype, op: Callable[[PointBuffers, Step], Step]
) -> None:
    held = random_held(3, held=8, hostile=0)
    step = step_of(held, dtype, two_parts=True, tokens=20)
    features, (exact, _) = held.features, readings(step)
    z = exact @ features.encoder.T + features.bias
    step.stream[:] = torch.where((z < -2).all(dim=1, keepdim=True), step.stream, step.stream * 0)
    # Moved far to the side of all eight, along the least that does it.
    far = torch.linalg.lstsq(features.encoder, torch.full((8, 1), -9.0)).solution[:, 0]
    step.stream[::2] += far.to(dtype)
    clear = ((readings(step)[0] @ features.encoder.T + features.bias) < -1).all(dim=1)
    after = op(held.buffers, step)
    assert clear.sum() > 8
    assert torch.equal(after.stream[clear], step.stream[clear])
    assert not torch.equal(after.stream, step.stream)


@pytest.mark.parametrize("op", EVERY_OP)
def test_a_feature_that_nothing_can_hold_is_said_to_be_lost(
    op: Callable[[PointBuffers, Step], Step],
) -> None:
    # One direction may not be above −1 and its opposite may not be above −1 either.
    unit = normalize(torch.ones(1, 64))
    rows = torch.cat([unit, -unit])
    zero = torch.zeros(2)
    features = FeatureRows(rows, zero, zero - INF, zero + 1, zero, zero - INF, rows)
    held = _slot(features, torch.full((2,), -1.0), [])
    after = op(held.buffers, step_of(held, torch.float32, two_parts=False, tokens=2))
    assert lost(after).all()


@pytest.mark.parametrize("op", EVERY_OP)
def test_a_held_token_that_is_not_finite_is_said_to_be_lost(
    op: Callable[[PointBuffers, Step], Step],
) -> None:
    held = random_held(1, held=2, hostile=0)
    step = step_of(held, torch.float32, two_parts=False, tokens=3)
    step.stream[1, 5] = torch.nan
    assert lost(op(held.buffers, step)).tolist() == [False, True, False]
