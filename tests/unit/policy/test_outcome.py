from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from steerserve.catalog import Catalog
from steerserve.plan import build_plan
from steerserve.policy.compiled import compile_policies
from steerserve.policy.document import parse_policy
from steerserve.policy.enforcement import Merged
from steerserve.policy.outcome import policy_entries, tokens_touched
from steerserve.report import Counts, TicketTally
from tests.unit.catalogs import make_catalog


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return dataclasses.replace(make_catalog(tmp_path_factory.mktemp("saes")), policy_rows=64)


def test_rows_of_one_feature_count_together_for_they_share_no_token(catalog: Catalog) -> None:
    change = "{sae: jump, feature: 3, op: %s, where: {phase: %s, stop: %s}}"
    entries = [change % ("ablate", "prompt", -1), change % ("ablate", "generation", 9)]
    other = "{sae: jump, feature: 4, op: ablate}"
    head = "name: p\nversion: 1\nmode: enforce\nowner: o\nreason: r\n"
    text = head + f"interventions: [{', '.join([*entries, other])}]"
    (one,) = compile_policies([parse_policy("p.yaml", text.encode())], catalog).values()
    plan = build_plan(one.rows, catalog)
    tokens: dict[Any, int] = {(3, "prompt"): 9, (3, "generation"): 4, (4, "all"): 12}
    counts = {n: Counts(tokens[row.feature, row.window.phase]) for n, row in enumerate(plan.rows)}
    merged, tally = Merged(plan, (one,)), TicketTally(1, counts)
    assert tokens_touched(merged, tally) == 13
    assert [entry["tokens"] for entry in policy_entries(merged, tally)] == [13]
