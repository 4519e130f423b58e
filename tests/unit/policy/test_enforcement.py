from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from steerserve.catalog import Catalog
from steerserve.compile import compile_plan
from steerserve.errors import ConflictError, PolicyError, RequestError, UnavailableError
from steerserve.plan import Plan
from steerserve.policy import compiled as compiled_module
from steerserve.policy.enforcement import Caller, Enforcement, InForce
from steerserve.spec import parse_spec
from tests.unit.catalogs import make_catalog

ABLATE = {"sae": "jump", "feature": 3, "op": "ablate"}
THREADS = 8
OTHER = {"sae": "jump", "feature": 9, "op": "add", "value": 1.0}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return dataclasses.replace(make_catalog(tmp_path_factory.mktemp("saes")), policy_rows=64)


def write(folder: Path, name: str = "p", version: int = 1, mode: str = "enforce", **fields: Any) -> None:
    document = {"name": name, "version": version, "mode": mode, "owner": "o", "reason": "no", **fields}
    (folder / f"{name}.yaml").write_text(json.dumps(document), encoding="utf-8")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write(tmp_path, interventions=[ABLATE])
    return tmp_path


def plan(catalog: Catalog, *interventions: dict[str, Any], **more: Any) -> Plan:
    return compile_plan(parse_spec({"interventions": list(interventions), **more}), catalog)


def test_a_request_that_asks_for_nothing_is_held_too(catalog: Catalog, home: Path) -> None:
    merged = Enforcement(home, catalog).current().merge(None, Caller())
    assert merged.plan is not None
    assert merged.enforced
    assert [(row.effect, row.feature) for row in merged.plan.rows] == [("hold", 3)]


def test_everything_that_no_policy_holds_composes(catalog: Catalog, home: Path) -> None:
    own = plan(catalog, OTHER)
    merged = Enforcement(home, catalog).current().merge(own, Caller())
    assert merged.plan is not None
    assert {(row.effect, row.feature) for row in merged.plan.rows} == {("hold", 3), ("edit", 9)}
    assert merged.plan.digest not in (own.digest, None)


@pytest.mark.parametrize(
    "op", [{"op": "ablate"}, {"op": "clamp", "value": 1.0}, {"op": "scale", "value": 1.0}]
)
def test_a_change_to_what_is_held_is_refused_by_the_policys_name(
    catalog: Catalog, home: Path, op: dict[str, Any]
) -> None:
    own = plan(catalog, OTHER, {"sae": "jump", "feature": 3, **op})
    with pytest.raises(ConflictError, match="jump 3, which policy `p` holds: no") as caught:
        Enforcement(home, catalog).current().merge(own, Caller())
    assert (caught.value.status, caught.value.param) == (403, "$.steering.interventions[1]")


def test_reading_what_is_held_is_no_conflict(catalog: Catalog, home: Path) -> None:
    own = plan(catalog, OTHER | {"when": {"feature": 3, "above": 0.5}})
    assert Enforcement(home, catalog).current().merge(own, Caller()).plan is not None


def test_a_shadow_holds_nothing(catalog: Catalog, home: Path) -> None:
    write(home, mode="shadow", interventions=[ABLATE])
    merged = Enforcement(home, catalog).current().merge(plan(catalog, ABLATE), Caller())
    assert merged.plan is not None
    assert sorted(row.effect for row in merged.plan.rows) == ["edit", "observe"]
    assert not merged.enforced


def test_only_the_callers_policies_apply(catalog: Catalog, home: Path) -> None:
    write(
        home,
        applies={"models": ["m"], "routes": ["/v1/completions"], "scopes": ["key:k"]},
        interventions=[ABLATE],
    )
    in_force = Enforcement(home, catalog).current()
    assert (
        in_force.merge(None, Caller(("m", "n"), "/v1/completions", frozenset({"infer"}), "k")).plan
        is not None
    )
    for caller in (
        Caller(),
        Caller(("m",), "/v1/completions"),
        Caller(("m",), "/v1/responses", frozenset(), "k"),
    ):
        assert in_force.merge(None, caller).plan is None


def test_equal_plans_of_other_orders_keep_their_own_reports(catalog: Catalog, home: Path) -> None:
    in_force = Enforcement(home, catalog).current()
    third = OTHER | {"feature": 11}
    one, other = plan(catalog, OTHER, third), plan(catalog, third, OTHER)
    first, second = in_force.merge(one, Caller()).plan, in_force.merge(other, Caller()).plan
    assert first is not None
    assert second is not None
    assert first.digest == second.digest
    origins = [[row.origin.index for row in p.rows if row.effect == "edit"] for p in (first, second)]
    assert origins == [[0, 1], [1, 0]]


def test_a_change_is_in_force_at_once(catalog: Catalog, home: Path) -> None:
    enforcement = Enforcement(home, catalog)
    before = enforcement.current()
    change = enforcement.folder.put("p", _document(2, "off"), if_match="*")
    after = enforcement.current()
    assert after.merge(None, Caller()).plan is None
    assert before.merge(None, Caller()).plan is not None  # a request keeps the version it began under
    assert change.set_version == after.version


def test_a_folder_that_changed_is_on_record_before_it_is_in_force(catalog: Catalog, home: Path) -> None:
    enforcement = Enforcement(home, catalog, every=0)
    before, told = enforcement.current(), []

    def record(in_force: InForce) -> None:
        assert enforcement.folder.enforced is before
        told.append(in_force)

    enforcement.folder.record = record
    write(home, version=2, mode="off", interventions=[ABLATE])
    after = enforcement.current()
    assert after.merge(None, Caller()).plan is None
    assert told == [after]
    assert enforcement.current() is after


def test_a_folder_that_cannot_be_put_on_record_changes_nothing_until_it_can(
    catalog: Catalog, home: Path
) -> None:
    enforcement = Enforcement(home, catalog, every=0)
    before = enforcement.current()

    def full(_: InForce) -> None:
        raise UnavailableError("expected room", at=(), reason="audit")

    enforcement.folder.record = full
    write(home, version=2, mode="off", interventions=[ABLATE])
    settled = time.time() - 60
    os.utime(home / "p.yaml", (settled, settled))
    for _ in range(2):
        assert enforcement.current() is before
        assert "expected room" in (enforcement.folder.problem or "")
    enforcement.folder.record = lambda _: None
    assert enforcement.current().merge(None, Caller()).plan is None
    assert enforcement.folder.problem is None


def test_a_change_that_several_threads_meet_is_compiled_and_recorded_once(
    catalog: Catalog, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enforcement = Enforcement(home, catalog, every=0)
    told: list[InForce] = []
    enforcement.folder.record = told.append
    compiled = count_calls(monkeypatch, "compile_policies")
    with ThreadPoolExecutor(THREADS) as pool:
        for version in range(2, 22):
            write(home, version=version, interventions=[ABLATE])
            gate = threading.Barrier(THREADS)

            def meet(gate: threading.Barrier = gate) -> None:
                gate.wait(60)
                enforcement.current()

            for done in [pool.submit(meet) for _ in range(THREADS)]:
                done.result(60)
            assert len(told) == compiled() == version - 1


class Yielding(Caller):
    """Lets another thread run whenever it is looked up."""

    def __hash__(self) -> int:
        time.sleep(0)
        return super().__hash__()


def test_a_cache_that_overflows_in_one_thread_takes_nothing_from_another(
    catalog: Catalog, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steerserve.policy.enforcement._MOST_CALLERS", 1)
    in_force = Enforcement(home, catalog).current()
    with ThreadPoolExecutor(THREADS) as pool:
        callers = [Yielding(key=f"k{number}") for number in range(4 * THREADS)] * 25
        found = list(pool.map(in_force.applying, callers))
    assert all([one.policy.name for one in applying.compiled] == ["p"] for applying in found)


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> Callable[[], int]:
    """How often a function of `policy.compiled` was called from now on."""
    original, calls = getattr(compiled_module, name), []

    def spy(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(compiled_module, name, spy)
    return lambda: len(calls)


def test_a_folder_that_cannot_be_enforced_stops_the_start_and_no_running_server(
    catalog: Catalog, home: Path
) -> None:
    enforcement = Enforcement(home, catalog)
    with pytest.raises(RequestError, match="got 900"):
        enforcement.folder.put("p", _document(2, "enforce", feature=900), if_match="*")
    assert enforcement.current().merge(None, Caller()).plan is not None
    write(home, interventions=[ABLATE | {"feature": 900}])
    with pytest.raises(PolicyError, match="got 900"):
        Enforcement(home, catalog)


def test_windows_of_both_together_are_bounded(catalog: Catalog, home: Path) -> None:
    windows = [{"name": f"w{i}", "sae": "jump", "feature": i, "where": {"start": i}} for i in range(60)]
    write(home, watch=windows)
    own = plan(catalog, *(OTHER | {"feature": i, "where": {"stop": i + 1}} for i in range(8)))
    with pytest.raises(RequestError, match="at most 64 different windows beside those of policies, got 68"):
        Enforcement(home, catalog).current().merge(own, Caller())


def test_what_depends_on_positions_says_so(catalog: Catalog, home: Path) -> None:
    write(home, interventions=[ABLATE | {"where": {"special_tokens": True}}])
    assert not Enforcement(home, catalog).current().depends_on_position
    # The special token that ends a prompt is steered, one that a beam has left behind is not.
    write(home, interventions=[ABLATE])
    assert Enforcement(home, catalog).current().depends_on_position
    write(home, interventions=[ABLATE | {"where": {"phase": "generation"}}])
    assert Enforcement(home, catalog).current().depends_on_position
    clamp = {"sae": "jump", "feature": 3, "op": "clamp", "value": 1.0}
    write(home, interventions=[clamp | {"latch": True, "when": {"feature": 4, "above": 1}}])
    assert Enforcement(home, catalog).current().depends_on_position


def _document(version: int, mode: str, feature: int = 3) -> bytes:
    entry = ABLATE | {"feature": feature}
    document = {"name": "p", "version": version, "mode": mode, "owner": "o", "reason": "no"}
    return json.dumps({**document, "interventions": [entry]}).encode()
