"""Latches, aborts, observers and ceilings where a plan needs a whole SAE."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from steerserve.catalog import Catalog, build_catalog
from steerserve.compile import compile_plan
from steerserve.config import SaeConfig, SteerserveConfig
from steerserve.layout import reading_places
from steerserve.plan import build_plan
from steerserve.runtime.host import HostRuntime
from steerserve.sae import Sae
from steerserve.sae.resident import Resident
from steerserve.spec import parse_spec
from steerserve.steer import NEVER, History, PointBuffers, hold_cpu
from steerserve.steer.dense import steer_dense
from tests.support.models import D_MODEL, N_LAYERS, VOCAB
from tests.support.saes import make_sae
from tests.unit.steer.staged import Step, by_reference, random_step
from tests.unit.test_history import random_request

SLOTS = 5


@pytest.fixture(scope="module")
def residents(catalog: Catalog) -> dict[str, Resident]:
    return {
        key: Resident.of(source.body)
        for key, source in catalog.sources.items()
        if isinstance(source.body, Sae)
    }


def _buffers(catalog: Catalog, point: int, seed: int, residents: list[str]) -> PointBuffers:
    """Random plans, whose rows take f from the resident SAEs although each could compute itself."""
    rng, buffers = random.Random(seed), PointBuffers(SLOTS, catalog.rows_per_point, D_MODEL)
    for slot in range(SLOTS):
        plan = random_request(rng, catalog, "any").plan
        buffers.write(slot, plan, point, catalog)
        for k, (source, feature) in enumerate(reading_places(plan.rows).get(point, [])):
            buffers.resident[slot, k] = residents.index(source) if source in residents else -1
            buffers.feature[slot, k] = feature
    return buffers


def by_dense(buffers: PointBuffers, step: Step, residents: list[Resident | None]) -> Step:
    """As the reference's stages, with `steer_dense` for the first two."""
    s = step.copy()
    at = torch.nonzero(s.slot >= 0)[:, 0]
    slot, rows, trace = s.slot[at], s.rows[at], s.trace[at]
    history = History(s.history.table[at], s.history.position[at], s.history.since)
    steer_dense(s.stream, s.addend, buffers, at, slot, rows, trace, residents, history)
    hold_cpu(s.stream, s.addend, buffers, at, slot, trace, history)
    s.rows[at] = rows
    s.trace.fill_(torch.nan)
    s.trace[at] = trace
    return s


@pytest.mark.parametrize("point", [2, 3])
@pytest.mark.parametrize("two_parts", [True, False], ids=["residual", "one tensor"])
def test_a_resident_sae_changes_nothing_about_what_is_noted_applied_and_held(
    catalog: Catalog, residents: dict[str, Resident], point: int, two_parts: bool
) -> None:
    noted = applied = 0
    for seed in range(40):
        buffers = _buffers(catalog, point, seed, list(residents))
        step = random_step(buffers, 24, torch.float32, two_parts=two_parts, seed=seed)
        expected, got = by_reference(buffers, step), by_dense(buffers, step, list(residents.values()))
        assert torch.equal(got.rows, expected.rows)
        assert torch.equal(got.history.since, expected.history.since)
        torch.testing.assert_close(got.trace, expected.trace, rtol=1e-4, atol=1e-4, equal_nan=True)
        torch.testing.assert_close(got.stream, expected.stream, rtol=1e-4, atol=1e-4)
        noted += int((got.history.since != step.history.since).sum())
        applied += int((~got.trace[..., 0].isnan()).sum())
    assert noted > 10
    assert applied > 200


@pytest.mark.parametrize("op", ["edit", "hold"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_only_a_row_that_is_held_is_lost_with_a_token_that_is_not_finite(
    catalog: Catalog, residents: dict[str, Resident], bad: float, op: str
) -> None:
    spec = parse_spec({"interventions": [{"sae": "jump", "feature": 3, "op": "ablate"}]})
    (row,) = compile_plan(spec, catalog).rows
    plan = build_plan([replace(row, effect="hold" if op == "hold" else "edit")], catalog)
    buffers = PointBuffers(1, catalog.rows_per_point, D_MODEL)
    buffers.write(0, plan, 3, catalog)
    buffers.resident[0, 0], buffers.feature[0, 0] = list(residents).index("sae:jump"), 3
    step = random_step(buffers, 4, torch.float32, two_parts=False, seed=0)
    step.slot.zero_()
    step.rows.fill_(1)
    step.history.table.copy_(torch.arange(4))
    step.history.since.fill_(NEVER)
    step.stream[2, 5] = bad
    after = by_dense(buffers, step, list(residents.values()))
    lost = (after.history.since != NEVER).any(dim=1)[:4]
    assert lost.tolist() == [False, False, op == "hold", False]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """A resident top-k SAE, and a resident JumpReLU one."""
    folder = tmp_path_factory.mktemp("resident")
    saes = [
        SaeConfig(name=kind, path=make_sae(folder / kind, kind, layer), resident=True)
        for kind, layer in (("topk", 1), ("jumprelu", 2))
    ]
    config = SteerserveConfig(saes=saes)
    return build_catalog(config, n_layers=N_LAYERS, d_model=D_MODEL)


@pytest.mark.parametrize("error", ["keep", "drop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("sae", "point"), [("topk", 2), ("jumprelu", 3)])
def test_no_reconstruction_lifts_a_held_feature(
    whole: Catalog, sae: str, point: int, dtype: torch.dtype, error: str
) -> None:
    held = list(range(12))
    hostile = [{"sae": sae, "feature": 40 + at, "op": "add", "value": 1e6 * (-1) ** at} for at in range(8)]
    own = compile_plan(parse_spec({"interventions": hostile, "error": error}), whole)
    ablations = [{"sae": sae, "feature": at, "op": "ablate"} for at in held]
    policy = compile_plan(parse_spec({"interventions": ablations}), whole)
    plan = build_plan([*own.rows, *(replace(row, effect="hold") for row in policy.rows)], whole, own.drop)
    runtime = HostRuntime(whole, [2, 3], max_requests=1, max_tokens=32, vocab=VOCAB)
    runtime.add("a", plan.wire, np.full(32, 9), "a", 0)
    counts = np.array([32], dtype=np.int32)
    runtime.begin_step(["a"], counts, counts * 0, np.full(32, 9, dtype=np.int32))
    generator = torch.Generator().manual_seed(0)
    stream = (torch.randn(32, D_MODEL, generator=generator) * 3).to(dtype)
    addend = torch.randn(32, D_MODEL, generator=generator).to(dtype)
    before = stream.clone()
    runtime.steer(point, stream, addend)
    assert runtime.aborts() == {}
    rows = whole.sources[f"sae:{sae}"].rows(held)
    exact = stream.float() + addend.float()
    assert not rows.activations(exact).any()
    assert not rows.activations(exact.to(dtype)).any()
    assert rows.activations(before.float() + addend.float()).any()
