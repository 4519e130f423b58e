from __future__ import annotations

from typing import Any

import pytest

from steerserve.policy import KnownNames, Policy, PolicySet, parse_policy

from .documents import document

INFER = frozenset({"infer", "steer"})
CHAT = "/v1/chat/completions"


def policy(name: str = "p", **changed: Any) -> Policy:
    return parse_policy(f"{name}.yaml", document(name, **changed))


@pytest.mark.parametrize(
    ("applies", "applying"),
    [
        ({}, True),
        ({"scopes": [], "models": [], "routes": []}, True),
        ({"scopes": ["infer"]}, True),
        ({"scopes": ["admin"]}, False),
        ({"scopes": ["admin", "key:app"]}, True),
        ({"scopes": ["key:other"]}, False),
        ({"models": ["demo"]}, True),
        ({"models": ["other"]}, False),
        ({"routes": ["/v1/completions", CHAT]}, True),
        ({"routes": ["/v1/completions"]}, False),
        ({"routes": [CHAT + "/batch"]}, False),
        ({"scopes": ["infer"], "models": ["demo"], "routes": [CHAT]}, True),
        ({"scopes": ["infer"], "models": ["other"], "routes": [CHAT]}, False),
    ],
)
def test_every_limit_that_is_given_must_match(applies: dict[str, list[str]], applying: bool) -> None:
    assert policy(applies=applies).applies.match("demo", CHAT, INFER, "app") is applying


@pytest.mark.parametrize(
    ("applies", "applying"),
    [({}, True), ({"models": ["demo"]}, True), ({"scopes": ["infer"]}, False), ({"routes": [CHAT]}, False)],
)
def test_offline_a_policy_for_some_scopes_or_routes_does_not_apply(
    applies: dict[str, list[str]], applying: bool
) -> None:
    assert policy(applies=applies).applies.match("demo", None, frozenset()) is applying


def test_a_key_named_like_a_scope_holds_no_scope() -> None:
    assert not policy(applies={"scopes": ["admin"]}).applies.match("demo", CHAT, INFER, "admin")


def test_policies_stand_in_the_order_of_their_names() -> None:
    assert list(PolicySet.of([policy("c"), policy("b"), policy("a")]).policies) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (KnownNames(), []),
        (KnownNames(models=["demo"]), ["dmeo"]),
        (KnownNames(keys=["app"]), ["key:ap"]),
        (KnownNames(["demo", "dmeo"], ["app", "ap"]), []),
        (KnownNames([], []), ["key:app", "key:ap", "demo", "dmeo"]),
    ],
)
def test_names_that_no_request_can_have_are_told(names: KnownNames, missing: list[str]) -> None:
    limits = {"models": ["demo", "dmeo"], "scopes": ["infer", "key:app", "key:ap"], "routes": [CHAT]}
    assert names.missing(policy(applies=limits).applies) == missing


def test_the_version_changes_with_every_byte_and_not_with_the_order() -> None:
    one, two, later = policy("one"), policy("two"), policy("two", version=2)
    versions = [PolicySet.of(members).version for members in ([], [one], [one, two], [one, later])]
    assert len(set(versions)) == 4
    assert PolicySet.of([two, one]).version == versions[2]
