"""What a request is told that used another tool's words, a misspelt key, or the wrong place."""

from __future__ import annotations

from typing import Any

import pytest

from steerserve.errors import RequestError
from steerserve.policy.document import read_policy
from steerserve.spec import parse_spec

GOOD = {"sae": "jump", "feature": 1, "op": "clamp", "value": 1.0}


def _refusal(value: Any) -> str:
    with pytest.raises(RequestError) as caught:
        parse_spec(value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"strength": 3.0},
            "key `strength`, which is not known here, got 3.0; did you mean `value`? - at",
        ),
        ({"coefficient": 1}, "did you mean `value`?"),
        ({"multiplier": 1}, "did you mean `value`?"),
        ({"layer": 3}, "did you mean `sae`, which stands at a layer of its own?"),
        ({"hook_point": "x"}, "did you mean `sae`"),
        ({"latent": 3}, "did you mean `feature`?"),
        ({"Value": 3}, "did you mean `value`?"),
        ({"feture": 3}, "did you mean `feature`?"),
        ({"phase": "prompt"}, "`phase` belongs in `where`"),
        ({"above": 3}, "`above` belongs in `when`"),
        ({"error": "drop"}, "`error` belongs beside `interventions`"),
        ({"where": {"position": [1]}}, "did you mean `positions`?"),
        ({"where": {"when": {}}}, "`when` belongs beside `where`"),
        ({"when": {"feature": 1, "threshold": 2.0}}, "did you mean `above`?"),
        ({"xyzzy": 3}, "expected no key `xyzzy`, which is not known here, got 3 - at"),
    ],
)
def test_an_unknown_key_hints_at_what_is_meant(changed: dict[str, Any], says: str) -> None:
    assert says in _refusal({"interventions": [GOOD | changed]})


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"edits": []}, "did you mean `interventions`?"),
        ({"feature": 3, "op": "ablate"}, "`feature` belongs in an entry of `interventions`"),
        ({"interventions": [], "strength": 2}, "`value` belongs in an entry of `interventions`"),
        ({"interventions": [], "raport": True}, "did you mean `report`?"),
        ([GOOD], 'expected `steering` to be an object {"interventions": […]}, got a list'),
    ],
)
def test_what_was_put_in_the_wrong_place_is_told_the_right_one(value: Any, says: str) -> None:
    assert says in _refusal(value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("interventions: [{feature: 1, op: clamp, strength: 2}]", "did you mean `value`?"),
        ("intervention: []", "did you mean `interventions`?"),
        ("watch: [{name: a, feature: 1, threshold: 2}]", "did you mean `above`?"),
        ("watch: [{name: a, feature: 1, phase: prompt}]", "`phase` belongs in `where`"),
        ("applies: {route: []}", "did you mean `routes`?"),
        # What only a request has is no help in a policy.
        ("report: true", "expected no key `report`, which is not known here, got true - at $.report"),
    ],
)
def test_policies_are_told_as_requests_are(line: str, says: str) -> None:
    head = "name: a\nversion: 1\nmode: enforce\nowner: x\nreason: y\n"
    with pytest.raises(RequestError) as caught:
        read_policy("a", (head + line).encode())
    assert says in str(caught.value)
