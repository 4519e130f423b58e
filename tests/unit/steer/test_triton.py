"""The GPU's kernels without a GPU: interpreted, against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from steerserve.catalog import Catalog
from steerserve.compile import compile_plan
from steerserve.plan import Plan
from steerserve.spec import Where, parse_spec
from steerserve.steer import NEVER, History, PointBuffers, steer_reference
from steerserve.tally import Tallies
from steerserve.tokens import Batch, TokenMap
from steerserve.window import Window, resolve
from tests.support.models import D_MODEL
from tests.support.saes import D_SAE
from tests.support.scale import scaled_examples
from tests.unit.steer.interpreting import interpreted
from tests.unit.windows import wheres

pytestmark = pytest.mark.interpreted

POINT = 3
VOCAB = 12
NO_NOTES = torch.full((8, 128), NEVER)
OPS = [("clamp", 3.0), ("ablate", None), ("scale", -1.5), ("add", 2.0), ("at_least", 1.0), ("at_most", 0.2)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
INF = torch.inf
# threshold, scale, shift, floor: relu, jumprelu, gated, the identity of a direction.
ACTIVATIONS = [(0.0, 1.0, 0.0, 0.0), (0.4, 1.0, 0.0, 0.0), (0.1, 1.7, -0.3, 0.0), (-INF, 1.0, 0.0, -INF)]
# a, c, lo, hi of the six ops.
EDITS = [(0, 3, -INF, INF), (0, 0, -INF, INF), (-1.5, 0, -INF, INF), (1, 2, -INF, INF), (1, 0, 1, INF),
         (1, 0, -INF, 0.2)]  # fmt: skip


def random_buffers(slots: int, rows: int, width: int, seed: int, *, gates: bool = True) -> PointBuffers:
    """Slots of random rows, with NaN wherever nothing may be read; the last slot is empty."""
    generator = torch.Generator().manual_seed(seed)
    buffers = PointBuffers(slots, rows, width)
    for part in (buffers.encoder, buffers.decoder, buffers.params, buffers.above, buffers.below):
        part.fill_(torch.nan)
    for slot in range(slots - 1):
        n = rows if slot == 0 else 1 + int(torch.randint(rows, (), generator=generator))
        buffers.count[slot] = n
        buffers.encoder[slot, :n] = torch.randn(n, width, generator=generator) / width**0.5
        buffers.decoder[slot, :n] = torch.randn(n, width, generator=generator) / width**0.5
        kinds = [(0.1, *ACTIVATIONS[(slot + k) % 4], *EDITS[(slot + k) % 6]) for k in range(n)]
        buffers.params[slot, :n, :9] = torch.tensor(kinds)
        buffers.above[slot, :n, :n], buffers.below[slot, :n, :n] = -INF, INF
        for k in range(2, n if gates else 0, 3):
            buffers.gated[slot, k] = True
            buffers.above[slot, k, (k + 1) % n] = -0.5
            buffers.below[slot, k, (k + 2) % n] = 1.0
        buffers.bit[slot, :n] = torch.randperm(64, generator=generator)[:n].int()
        # A row that only conditions read.
        buffers.bit[slot, n // 2] = -1 if n > 3 else buffers.bit[slot, n // 2]
    return buffers


def hold_to_the_reference(
    buffers: PointBuffers, slot: Tensor, dtype: torch.dtype, *, two_parts: bool, seed: int = 0
) -> int:
    """Compare every token's stream and trace; returns how many rows applied."""
    generator = torch.Generator().manual_seed(seed)
    tokens, rows, width = len(slot), buffers.bit.shape[1], buffers.encoder.shape[2]
    # Columns beyond the width are another tensor's: rows of the stream need not stand side by side.
    storage = torch.randn(tokens, width + 16, generator=generator).to(dtype)
    addend = torch.randn(tokens, width, generator=generator).to(dtype) if two_parts else None
    mask = torch.randint(-(2**63), 2**63 - 1, (tokens,), generator=generator)
    expected, expected_trace = storage[:, :width].clone(), torch.empty(tokens, rows, 2)
    steer_reference(expected, addend, buffers, slot, mask, expected_trace)

    got, trace = storage.clone(), torch.full((tokens, rows, 2), 7.0)
    with interpreted() as kernels:
        kernels.steer_triton(got[:, :width], addend, buffers, slot, mask, trace, History.blank(tokens))

    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got[:, :width], expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(got[:, width:], storage[:, width:])
    active = (slot >= 0) & (buffers.count[slot.clamp(min=0)] > 0)
    f, edited = expected_trace.nan_to_num().unbind(dim=2)
    unchanged = ~active | (f == edited).all(dim=1)
    assert torch.equal(got[unchanged], storage[unchanged])
    assert (trace[~active] == 7.0).all()
    torch.testing.assert_close(trace[active], expected_trace[active], rtol=1e-4, atol=1e-5, equal_nan=True)
    return int((~expected_trace[active, :, 0].isnan()).sum())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("two_parts", [True, False], ids=["residual", "one tensor"])
@pytest.mark.parametrize(
    ("width", "rows", "tokens"), [(128, 1, 6), (256, 8, 6), (896, 20, 5), (4096, 32, 4), (8192, 64, 3)]
)
def test_the_kernel_is_the_reference(
    width: int, rows: int, tokens: int, two_parts: bool, dtype: torch.dtype
) -> None:
    buffers = random_buffers(4, rows, width, seed=width)
    slot = torch.tensor([0, -1, 1, 2, 3, 0], dtype=torch.int32)[:tokens]
    assert hold_to_the_reference(buffers, slot, dtype, two_parts=two_parts) > 0


# Always the same examples: once in a thousand runs, an activation would lie within rounding of its threshold.
@settings(max_examples=50, derandomize=True)
@given(
    rows=st.integers(1, 64),
    slots=st.lists(st.integers(-1, 3), max_size=6),
    seed=st.integers(0, 2**16),
    gates=st.booleans(),
)
@example(rows=3, slots=[], seed=0, gates=True)
@example(rows=64, slots=[0], seed=1, gates=True)
def test_the_kernel_is_the_reference_for_any_number_of_rows_and_tokens(
    rows: int, slots: list[int], seed: int, gates: bool
) -> None:
    buffers = random_buffers(4, rows, 96, seed, gates=gates)
    slot = torch.tensor(slots, dtype=torch.int32)
    hold_to_the_reference(buffers, slot, torch.float32, two_parts=bool(seed % 2), seed=seed)


def _plan(catalog: Catalog, number: int) -> Plan:
    """A plan over every op, both SAEs, a direction and conditions."""
    interventions = []
    for i in range(1 + 5 * number % 16):
        op, value = OPS[(number + i) % 6]
        one: dict[str, Any] = {"sae": ("jump", "gate")[i % 2], "feature": (7 * number + 11 * i) % D_SAE}
        if i == 0 and number % 3 == 0:
            one = {"direction": "north"}
        elif i % 3 == 1:
            one["when"] = {"sae": "jump", "feature": (number + i) % D_SAE, "above": 0.1}
        one |= {"op": op, "only_if_active": i % 4 == 2} | ({} if value is None else {"value": value})
        interventions.append(one)
    return compile_plan(parse_spec({"interventions": interventions}), catalog)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_plans_over_real_dictionaries_are_the_reference(catalog: Catalog, dtype: torch.dtype) -> None:
    buffers = PointBuffers(8, catalog.rows_per_point, D_MODEL)
    for number in range(8):
        buffers.write(number, _plan(catalog, number), POINT, catalog)
    slot = torch.arange(-1, 15, dtype=torch.int32) % 8
    slot[0] = -1
    assert hold_to_the_reference(buffers, slot, dtype, two_parts=True) > 40


def test_a_token_that_no_row_applies_to_keeps_its_bits_and_says_so() -> None:
    buffers = random_buffers(2, 4, 128, seed=1)
    stream = torch.full((3, 128), -0.0, dtype=torch.bfloat16)
    before, trace = stream.clone(), torch.zeros(3, 4, 2)
    slot, no_rows = torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
    with interpreted() as kernels:
        kernels.steer_triton(stream, None, buffers, slot, no_rows, trace, History.blank(len(slot)))
    assert torch.equal(stream.view(torch.int16), before.view(torch.int16))
    assert trace.isnan().all()


def test_no_row_applies_where_an_activation_is_not_finite() -> None:
    buffers = random_buffers(2, 4, 128, seed=1, gates=False)
    buffers.params[0, 3, 1:5] = torch.tensor(ACTIVATIONS[3])
    buffers.encoder[0, 3] = buffers.encoder[0, 3].abs()
    stream = torch.full((1, 128), 1e38)
    before, trace = stream.clone(), torch.zeros(1, 4, 2)
    with interpreted() as kernels, np.errstate(over="ignore", invalid="ignore"):
        kernels.steer_triton(
            stream, stream.clone() * 2, buffers, torch.zeros(1, dtype=torch.int32), torch.tensor([-1]), trace,
            History.blank(1),
        )  # fmt: skip
    assert torch.equal(stream, before)
    assert trace.isnan().all()


_position = st.integers(-9, 16)
_token = st.integers(0, VOCAB - 1)
_where = wheres(_position, _token, 4)
_request = st.tuples(
    st.lists(_where, max_size=4),  # no window: a request without a plan
    st.integers(1, 8),  # the prompt's length
    st.integers(0, 12),  # computed before
    st.lists(st.integers(-1, VOCAB + 1), max_size=7),  # scheduled now
)


@scaled_examples(60, 20)
@given(requests=st.lists(_request, min_size=1, max_size=5), dtype=st.sampled_from([torch.int32, torch.int64]))
def test_the_token_map_is_the_hosts(
    requests: list[tuple[list[dict[str, Any]], int, int, list[int]]], dtype: torch.dtype
) -> None:
    selectors = [
        resolve([Window.of(Where(**where)) for where in wheres], prompt_len) if wheres else None
        for wheres, prompt_len, _, _ in requests
    ]
    slots = [-1 if selector is None else 3 * i for i, selector in enumerate(selectors)]
    tables = [-1 if selector is None else 7 + i for i, selector in enumerate(selectors)]
    batch = Batch.of(slots, selectors)
    ids = [token for *_, scheduled in requests for token in scheduled]
    spans = [(computed, len(scheduled)) for _, _, computed, scheduled in requests]
    special = np.zeros(VOCAB, dtype=np.bool_)
    special[:3] = True
    host = TokenMap(64, special)
    sizes = np.array([n for _, n in spans], dtype=np.int32)
    computed_before = np.array([computed for computed, _ in spans], dtype=np.int32)
    n = host.fill(batch, sizes, computed_before, np.array(ids, dtype=np.int32))

    # What lies behind a step's tokens and requests is left from earlier ones.
    padding = [99] * (64 - len(ids))
    starts = torch.from_numpy(np.concatenate([[0], np.cumsum(sizes), [3, 9]]).astype(np.int32))
    positions = torch.tensor([computed + i for computed, m in spans for i in range(m)] + padding)
    slot, rows, table, position = (
        torch.full((64,), 5, dtype=kind) for kind in (torch.int32, torch.int64, torch.int32, torch.int64)
    )
    with interpreted() as kernels:
        kernels.fill_triton(
            kernels.DeviceBatch.of(batch, tables, "cpu"),
            starts,
            positions,
            torch.tensor(ids + padding, dtype=dtype),
            torch.from_numpy(special),
            slot,
            rows,
            table,
            position,
            NO_NOTES.repeat(4, 1),
        )

    steered = torch.nonzero(slot >= 0)[:, 0]
    assert steered.tolist() == host.index[:n].tolist()
    assert slot[steered].tolist() == host.slot[:n].tolist()
    assert rows[steered].tolist() == host.rows[:n].tolist()
    assert position[steered].tolist() == host.position[:n].tolist()
    assert table[steered].tolist() == [tables[owner] for owner in host.owner[:n]]


def test_a_prompt_longer_than_a_block_is_mapped_to_its_end() -> None:
    selector = resolve([Window(start=1500, special_tokens=True)], 2500)
    slot, rows, table, position = (
        torch.zeros(2600, dtype=kind) for kind in (torch.int32, torch.int64, torch.int32, torch.int64)
    )
    with interpreted() as kernels:
        layout = kernels.DeviceBatch.of(Batch.of([2], [selector]), [4], "cpu")
        kernels.fill_triton(
            layout, torch.tensor([0, 2500], dtype=torch.int32), torch.arange(2500), torch.zeros(2500).int(),
            torch.ones(1, dtype=torch.bool), slot, rows, table, position, NO_NOTES,
        )  # fmt: skip
    assert torch.equal(slot, torch.tensor([-1] * 1500 + [2] * 1000 + [-1] * 100, dtype=torch.int32))


@settings(max_examples=25)
@given(rows=st.integers(1, 20), most=st.integers(1, 150), seed=st.integers(0, 2**16), of_one=st.booleans())
def test_what_was_steered_is_counted_as_on_the_host(rows: int, most: int, seed: int, of_one: bool) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    buffers = PointBuffers(4, rows, 1)
    buffers.count[:] = draw(0, rows + 1, 4)
    buffers.bit[:] = torch.stack([torch.randperm(64, generator=generator)[:rows] for _ in range(4)])
    buffers.bit[:, ::3] = -1
    buffers.row[:] = buffers.bit
    # Request r has slot r and table 5 − r; request 4 has no plan, and request 3 no table.
    slot_of, table_of = torch.tensor([0, 1, 2, 3, -1]), torch.tensor([5, 4, 3, -1, -1])
    host, device = Tallies(6), Tallies(6)
    for tallies in (host, device):
        assert [tallies.open() for _ in range(6)] == [*range(6)]
    stands = torch.zeros(5, dtype=torch.int64)
    for _ in range(4):
        # Some tokens are computed again, and of some it is not known yet whether they stand.
        begins = (stands - draw(0, 3, 5)).clamp(min=0)
        counts = torch.tensor([0, most, 0, 0, 0]) if of_one else draw(0, most + 1, 5)
        limits = torch.maximum(stands, begins + counts - draw(0, 3, 5))
        owner = torch.arange(5).repeat_interleave(counts)
        position = torch.cat([torch.arange(b, b + n) for b, n in zip(begins, counts, strict=True)])
        trace = torch.randn(max(len(owner), 1), rows, 2, generator=generator)
        trace[torch.rand(max(len(owner), 1), rows, generator=generator) < 0.3] = torch.nan
        steered = torch.nonzero(slot_of[owner] >= 0)[:, 0]
        host.count(
            table_of.int().numpy(), owner[steered].int().numpy(), position[steered].numpy(), stands.numpy(),
            limits.numpy(), slot_of[owner][steered].int().numpy(), buffers.count.numpy(), buffers.row.numpy(),
            trace[steered].contiguous().numpy(),
        )  # fmt: skip
        by_table = device.limits(table_of, limits)
        with interpreted() as kernels:
            kernels.count_triton(
                device.table,
                device.recent,
                slot_of[owner].int(),
                table_of[owner].int(),
                position,
                device.settled,
                by_table,
                buffers,
                trace,
            )
        device.settle(by_table)
        stands = limits
    torch.testing.assert_close(device.table, host.table, rtol=1e-12, atol=1e-12)
    assert device.recent.at.equal(host.recent.at)
    filled = host.recent.at >= 0
    assert device.recent.values[filled].equal(host.recent.values[filled])
