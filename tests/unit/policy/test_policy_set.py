from __future__ import annotations

from typing import Any

import pytest

from steerserve.policy import Policy, PolicySet, parse_policy

from .documents import document

INFER = frozenset({"infer", "steer"})
CHAT = "/v1/chat/completions"


def policy(name: str = "p", **changed: Any) -> Policy:
    return parse_policy(f"{name}.yaml", document(name, **changed))


def names(policies: PolicySet, *request: Any) -> list[str]:
    return [found.name for found in policies.applying(*request)]


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
    policies = PolicySet.of([policy(applies=applies)])
    assert names(policies, "demo", CHAT, INFER, "app") == (["p"] if applying else [])


@pytest.mark.parametrize(
    ("applies", "applying"),
    [({}, True), ({"models": ["demo"]}, True), ({"scopes": ["infer"]}, False), ({"routes": [CHAT]}, False)],
)
def test_offline_a_policy_for_some_scopes_or_routes_does_not_apply(
    applies: dict[str, list[str]], applying: bool
) -> None:
    policies = PolicySet.of([policy(applies=applies)])
    assert bool(policies.applying("demo", None, frozenset())) is applying


def test_a_key_named_like_a_scope_holds_no_scope() -> None:
    policies = PolicySet.of([policy(applies={"scopes": ["admin"]})])
    assert names(policies, "demo", CHAT, INFER, "admin") == []


def test_shadow_policies_apply_and_those_that_are_off_do_not() -> None:
    policies = PolicySet.of([policy("c", mode="off"), policy("b", mode="shadow"), policy("a")])
    assert list(policies.policies) == ["a", "b", "c"]
    assert names(policies, None, None, frozenset()) == ["a", "b"]


def test_the_version_changes_with_every_byte_and_not_with_the_order() -> None:
    one, two, later = policy("one"), policy("two"), policy("two", version=2)
    versions = [PolicySet.of(members).version for members in ([], [one], [one, two], [one, later])]
    assert len(set(versions)) == 4
    assert PolicySet.of([two, one]).version == versions[2]
