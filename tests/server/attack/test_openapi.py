"""Schemathesis on every route that steerserve adds, and on `steering` in every route that takes it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.schemas import BaseSchema

from steerserve.spec import SteeringSpec
from tests.server.attack.running import Attacked
from tests.server.attack.test_routes import BODIES, body_of
from tests.support.scale import amount, scaled

# For a run by hand: 500.
CASES = amount(40, 10, "ATTACK_CASES")
pytestmark = scaled

MODES = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
ADDED = [
    ("GET", "/v1/steering/capabilities"),
    ("GET", "/v1/steering/directions"),
    ("GET", "/v1/steering/health"),
    ("GET", "/v1/steering/policies"),
    ("GET", "/v1/steering/policies/{name}"),
    ("PUT", "/v1/steering/policies/{name}"),
    ("DELETE", "/v1/steering/policies/{name}"),
    ("GET", "/v1/steering/saes"),
]
BOUNDED = settings(max_examples=CASES, database=None, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def added(attacked: Attacked) -> BaseSchema:
    document = attacked.server.http.get("/openapi.json").json()
    ours = {path: item for path, item in document["paths"].items() if path.startswith("/v1/steering")}
    found = {(method.upper(), path) for path, item in ours.items() for method in item}
    assert found == set(ADDED)
    return schemathesis.openapi.from_dict({**document, "paths": ours})


@pytest.fixture(scope="module")
def carrying() -> BaseSchema:
    """The routes of others, with a body that is sound but for its `steering`."""
    return schemathesis.openapi.from_dict(
        {
            "openapi": "3.1.0",
            "info": {"title": "steering", "version": "1"},
            "paths": {path: {"post": _operation(path)} for path in BODIES},
        }
    )


def _operation(path: str) -> dict[str, Any]:
    schema = SteeringSpec.model_json_schema()
    definitions = schema.pop("$defs")
    said = {name: {"const": value} for name, value in body_of(path).items()}
    whole = {
        "type": "object",
        "properties": {**said, "steering": schema},
        "required": [*said, "steering"],
        "additionalProperties": False,
        "$defs": definitions,
    }
    text = {"schema": _inlined(whole, definitions)}
    return {
        "requestBody": {"required": True, "content": {"application/json": text}},
        "responses": {"default": {"description": "any"}},
    }


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """References are to the document's root, which this schema is not."""
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(value, definitions) for key, value in schema.items() if key != "$defs"}


def attack(attacked: Attacked, schema: BaseSchema, method: str, path: str, mode: GenerationMode) -> int:
    """Send what Schemathesis makes up. Returns: how many cases there were."""
    operation, sent = schema[path][method], 0
    # Nothing to spoil: any text is a name, or a header.
    if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
        mode = GenerationMode.POSITIVE

    @BOUNDED
    @given(st.data())
    def check(data: st.DataObject) -> None:
        nonlocal sent
        case = data.draw(operation.as_strategy(generation_mode=mode))
        reply = case.call(base_url=attacked.server.url, headers=attacked.head("all"), timeout=120)
        sent += 1
        assert reply.status_code < 500, (reply.status_code, reply.text[:400])

    check()
    return sent


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path"), ADDED)
def test_a_route_of_ours_answers_whatever_its_document_allows_or_forbids(
    attacked: Attacked, added: BaseSchema, method: str, path: str, mode: GenerationMode
) -> None:
    assert attack(attacked, added, method, path, mode) > 0
    _still_holds(attacked)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", BODIES)
def test_a_route_that_carries_steering_answers_whatever_stands_in_it(
    attacked: Attacked, carrying: BaseSchema, path: str, mode: GenerationMode
) -> None:
    assert attack(attacked, carrying, "POST", path, mode) > 0


def _still_holds(attacked: Attacked) -> None:
    reply: httpx.Response = attacked.server.http.get("/v1/steering/policies")
    assert {"churn", "hold", "look"} <= {entry["name"] for entry in reply.json()["data"]}
    assert reply.json()["problem"] is None
