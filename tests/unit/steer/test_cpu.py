from __future__ import annotations

import pytest
import torch

from steerserve.catalog import Catalog
from steerserve.compile import compile_plan
from steerserve.spec import parse_spec
from steerserve.steer import PointBuffers, steer_cpu, steer_reference
from tests.support.models import D_MODEL
from tests.support.saes import D_SAE

POINT = 3
OPS = [("clamp", 3.0), ("ablate", None), ("scale", -1.5), ("add", 2.0), ("at_least", 1.0), ("at_most", 0.2)]


def _buffers(catalog: Catalog, plans: int) -> PointBuffers:
    buffers = PointBuffers(plans, catalog.rows_per_point, D_MODEL)
    for slot in range(plans):
        interventions = []
        for i in range(1 + 5 * slot % 16):
            op, value = OPS[(slot + i) % 6]
            one = {"sae": ("jump", "gate")[i % 2], "feature": (7 * slot + 11 * i) % D_SAE, "op": op}
            if value is not None:
                one["value"] = value
            if i % 3 == 1:
                one["when"] = {"feature": (slot + i) % D_SAE, "above": 0.1}
            one["only_if_active"] = i % 4 == 2
            interventions.append(one)
        if slot % 3 == 0:
            interventions[0] = {"direction": "north", "op": "add", "value": 1.0}
        buffers.write(
            slot, compile_plan(parse_spec({"interventions": interventions}), catalog), POINT, catalog
        )
    return buffers


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("two_parts", [True, False], ids=["residual", "one tensor"])
def test_the_compiled_loop_is_the_reference(
    catalog: Catalog, dtype: torch.dtype, tolerance: float, two_parts: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    buffers = _buffers(catalog, 8)
    n = 50
    stream = torch.randn(n, D_MODEL, generator=generator).to(dtype)
    addend = torch.randn(n, D_MODEL, generator=generator).to(dtype) if two_parts else None
    slot = torch.randint(-1, 8, (n,), generator=generator, dtype=torch.int32)
    rows = torch.randint(-(2**62), 2**62, (n,), generator=generator)
    expected, expected_trace = stream.clone(), torch.empty(n, catalog.rows_per_point, 2)
    steer_reference(expected, addend, buffers, slot, rows, expected_trace)

    got, trace = stream.clone(), torch.empty(n, catalog.rows_per_point, 2)
    steered = torch.nonzero(slot >= 0)[:, 0]
    steer_cpu(got, addend, buffers, steered, slot[steered], rows[steered], trace)

    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(got[slot < 0], stream[slot < 0])
    assert not torch.equal(got, stream)
    torch.testing.assert_close(
        trace[: len(steered)], expected_trace[steered], rtol=1e-4, atol=1e-4, equal_nan=True
    )


def test_a_token_that_no_row_applies_to_keeps_its_bits(catalog: Catalog) -> None:
    buffers = _buffers(catalog, 2)
    stream = torch.randn(4, D_MODEL).to(torch.bfloat16)
    before = stream.clone()
    everything = torch.arange(4)
    steer_cpu(
        stream, None, buffers, everything, torch.zeros(4, dtype=torch.int32), torch.zeros(4,
        dtype=torch.int64), torch.empty(4, catalog.rows_per_point, 2),
    )  # fmt: skip
    assert torch.equal(stream, before)
