"""Whatever stands in a request, a policy, a file of keys or a log: it is understood, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from steerserve.access.key_file import parse_key_file
from steerserve.audit import AuditLog, Record, verify
from steerserve.errors import AuditError, KeyFileError, PolicyError, RequestError, SteerserveError
from steerserve.policy.compiled import check_policies, compile_policies
from steerserve.policy.document import read_policy
from steerserve.policy.enforcement import InForce
from tests.fuzz import checkpoint, spec
from tests.fuzz.fuzzing import EXAMPLES, examine
from tests.fuzz.strategies import AUDIT_LINES, JSON, KEY_FILES, POLICIES, mutated
from tests.support.scale import scaled

pytestmark = scaled


def as_yaml(value: Any) -> bytes:
    try:
        return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (ValueError, yaml.YAMLError):
        return json.dumps(value, default=str).encode()


def check_said(error: SteerserveError, where: str) -> None:
    assert where in str(error), error


def test_a_steering_object_is_a_plan_or_refused() -> None:
    examine(spec.VALUES, spec.holds_of_a_value)


def test_a_text_is_a_steering_object_or_refused() -> None:
    examine(spec.TEXTS, spec.holds_of_a_text)


def test_a_body_that_names_steering_never_keeps_it() -> None:
    examine(spec.BODIES, spec.holds_of_a_body)


def test_a_policy_is_compiled_or_refused() -> None:
    def holds(content: bytes) -> None:
        try:
            policy = read_policy("hold", content)
        except RequestError as error:
            check_said(error, "")
            return
        try:
            check_policies([policy], spec.catalog())
        except PolicyError as error:
            check_said(error, "hold")

    examine(POLICIES.map(as_yaml) | JSON.map(as_yaml) | st.binary(max_size=60), holds)


def test_a_request_beside_policies_is_merged_or_refused() -> None:
    def holds(drawn: tuple[Any, Any]) -> None:
        from steerserve.compile import compile_plan
        from steerserve.policy.enforcement import Caller
        from steerserve.spec import parse_spec

        asked, said = drawn
        try:
            own = compile_plan(parse_spec(asked), spec.catalog())
            policy = read_policy("hold", as_yaml(said))
            compiled = compile_policies([policy], spec.catalog())
        except (RequestError, PolicyError):
            return
        try:
            merged = InForce("1", compiled, spec.catalog()).merge(own, Caller())
        except RequestError:
            return
        assert merged.plan is not None
        held = {(row.source, row.feature) for one in compiled.values() for row in one.rows if row.applies}
        applied = {(row.source, row.feature) for row in merged.plan.rows if row.applies}
        assert held <= applied or not merged.policies

    sound = {"name": "hold", "version": 1, "mode": "enforce", "owner": "a", "reason": "b"}
    whole = POLICIES.map(lambda said: {**said, **sound, "applies": {}})
    examine(st.tuples(spec.SPECS, whole), holds)


def test_a_file_of_keys_is_read_or_refused() -> None:
    def holds(content: bytes) -> None:
        try:
            parse_key_file(content, Path("keys.yaml"))
        except KeyFileError as error:
            check_said(error, "keys.yaml")

    examine(KEY_FILES.map(as_yaml) | JSON.map(as_yaml) | st.binary(max_size=60), holds)


def test_a_log_with_any_line_in_it_is_verified_or_named_as_damaged(tmp_path: Path) -> None:
    with_log(tmp_path)
    (file,) = tmp_path.glob("audit-*.jsonl")
    whole = file.read_bytes()

    def holds(content: bytes) -> None:
        file.write_bytes(content)
        try:
            verdict = verify(tmp_path)
        except AuditError:
            return
        # Behind the signed head nobody vouches for anything.
        assert not verdict.ok or content.startswith(whole)

    lines = st.lists(
        AUDIT_LINES.map(lambda line: json.dumps(line, default=str).encode()), min_size=1, max_size=3
    )
    foreign = lines.map(lambda found: b"\n".join(found) + b"\n")
    spoiled = mutated(whole).filter(lambda content: content != whole)
    examine(foreign | spoiled, holds, EXAMPLES // 2)


def with_log(folder: Path) -> None:
    log = AuditLog(folder, fsync="never")
    for number in range(4):
        log.append(Record(event="request", request_id=f"r{number}", outcome="ok", status=200)).result()
    log.close()


def test_an_sae_on_disk_opens_or_is_refused() -> None:
    examine(checkpoint.damaged(), checkpoint.holds)


@pytest.mark.parametrize("module", [spec, checkpoint], ids=["spec", "checkpoint"])
def test_a_target_runs_without_a_fuzzer(module: Any) -> None:
    values, holds = (
        (module.VALUES, module.holds_of_a_value) if module is spec else (module.damaged(), module.holds)
    )
    examine(values, holds, 5)
