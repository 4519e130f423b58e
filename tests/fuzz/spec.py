"""Fuzz target: a `steering` object is a plan, or a RequestError says why it is none."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from steerserve.catalog import POLICY_ROWS, Catalog
from steerserve.compile import compile_plan
from steerserve.errors import RequestError
from steerserve.plan import Plan
from steerserve.server.body import take_steering
from steerserve.spec import SteeringSpec, parse_spec, parse_spec_json
from tests.fuzz.fuzzing import run
from tests.fuzz.strategies import JSON, SPECS
from tests.unit.catalogs import make_catalog

VALUES = SPECS | JSON
TEXTS = st.text(max_size=60) | VALUES.map(lambda value: json.dumps(value, default=str))


@cache
def catalog() -> Catalog:
    """One for all examples."""
    return replace(make_catalog(Path(tempfile.mkdtemp())), policy_rows=POLICY_ROWS)


def holds_of_a_value(value: Any) -> None:
    """What is parsed is compiled, and comes through the wire as it was; anything else is refused by name."""
    try:
        plan = compile_plan(parse_spec(value), catalog())
    except RequestError as error:
        _is_told_by_name(error)
        return
    assert Plan.from_wire(json.loads(json.dumps(plan.wire))).digest == plan.digest
    plan.selector(7)


def _is_told_by_name(error: RequestError) -> None:
    assert str(error).startswith(("expected", "`")), error
    assert error.param.startswith("$.steering"), error
    assert error.status == 400
    json.dumps([str(error), error.param])


def holds_of_a_text(text: str) -> None:
    """Text is a spec or refused."""
    try:
        found = parse_spec_json(text)
    except RequestError as error:
        _is_told_by_name(error)
        return
    assert isinstance(found, SteeringSpec)


def holds_of_a_body(body: bytes) -> None:
    """A body that names `steering` at its top gives it away or is refused, whatever encoding it is in."""
    try:
        taken = take_steering(body, "application/json", "/v1/completions")
    except RequestError:
        return
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        assert taken is None
        return
    named = isinstance(document, dict) and "steering" in document
    assert (taken is not None) == named
    assert taken is None or "steering" not in taken[1]


BODIES = st.one_of(
    st.binary(max_size=60),
    st.builds(
        lambda value, encoding: json.dumps({"model": "m", "steering": value}, default=str).encode(encoding),
        VALUES,
        st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-le"]),
    ),
    JSON.map(lambda value: json.dumps(value, default=str).encode()),
)

if __name__ == "__main__":
    run(VALUES, holds_of_a_value)
