from __future__ import annotations

import hashlib
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from steerserve.errors import PolicyError, RequestError
from steerserve.policy import Policy, parse_policy
from steerserve.policy.document import MAX_BYTES, read_policy

from .documents import document

WATCH = {"name": "flattery", "feature": 3}
EXAMPLE = b"""\
name: no-scam
version: 7
mode: off
owner: safety@example.org
reason: "Ticket 12: never help with scams."
applies:
  scopes: [infer, "key:app one"]
  models: [demo]
  routes: [/v1/chat/completions]
interventions:
  - {sae: demo, feature: scam, op: ablate}
  - feature: 7
    op: at_most
    value: 8            # a whole number is a fine value
    where: {phase: generation}
    when: {feature: 2, above: 1}
watch:
  - {name: flattery, direction: french, above: -2}
"""


def refusal(content: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read_policy("no-scam", content)
    return caught.value


def test_a_document_is_read_as_it_is_written() -> None:
    policy = parse_policy("no-scam.yaml", EXAMPLE)
    assert (policy.name, policy.version, policy.mode) == ("no-scam", 7, "off")
    assert policy.applies.scopes == ["infer", "key:app one"]
    assert (policy.interventions[0].feature, policy.interventions[1].value) == ("scam", 8.0)
    assert policy.interventions[1].conditions[0].above == 1.0
    assert (policy.watch[0].above, policy.watch[0].conditions) == (-2.0, [])
    assert policy.text.encode() == EXAMPLE
    assert policy.sha256 == hashlib.sha256(EXAMPLE).hexdigest()
    assert policy.etag == f'"{policy.sha256}"'


def test_a_policy_cannot_be_changed() -> None:
    policy = parse_policy("no-scam.yaml", EXAMPLE)
    with pytest.raises(ValueError, match="frozen"):
        policy.mode = "enforce"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"name": "Other"}, "name"),
        ({"name": "other"}, "name"),
        ({"name": 3}, "name"),
        ({"version": 0}, "version"),
        ({"version": True}, "version"),
        ({"version": 1.0}, "version"),
        ({"version": "1"}, "version"),
        ({"version": 2**53}, "version"),
        ({"mode": "on"}, "mode"),
        ({"mode": False}, "mode"),
        ({"owner": " "}, "owner"),
        ({"owner": 3}, "owner"),
        ({"owner": None}, "owner"),
        ({"reason": "\n"}, "reason"),
        ({"reason": None}, "reason"),
        ({"ownr": "x"}, "ownr"),
        ({"applies": []}, "applies"),
        ({"applies": {"scope": []}}, "applies.scope"),
        ({"applies": {"scopes": ["all"]}}, "applies.scopes[0]"),
        ({"applies": {"scopes": ["infer", "key:"]}}, "applies.scopes[1]"),
        ({"applies": {"scopes": "infer"}}, "applies.scopes"),
        ({"applies": {"models": [""]}}, "applies.models[0]"),
        ({"applies": {"routes": ["v1/completions"]}}, "applies.routes[0]"),
        ({"interventions": {}}, "interventions"),
        ({"interventions": [{"feature": 5, "op": "explode"}]}, "interventions[0].op"),
        ({"interventions": [{"feature": 5, "op": "clamp"}]}, "interventions[0]"),
        ({"interventions": [{"feature": 5, "op": "clamp", "value": "8"}]}, "interventions[0].value"),
        ({"interventions": [{"feature": 5, "op": "clamp", "value": float("nan")}]}, "interventions[0].value"),
        ({"interventions": [{"feature": 5, "op": "clamp", "value": float("inf")}]}, "interventions[0].value"),
        ({"interventions": [{"feature": -5, "op": "ablate"}]}, "interventions[0].feature"),
        ({"interventions": [{"feature": 5, "op": "ablate", "whn": 1}]}, "interventions[0].whn"),
        ({"interventions": [{"op": "ablate", "where": {"phase": 1}}]}, "interventions[0].where.phase"),
        ({"watch": [{"feature": 3}]}, "watch[0].name"),
        ({"watch": [WATCH | {"name": "Loud"}]}, "watch[0].name"),
        ({"watch": [WATCH | {"direction": "north"}]}, "watch[0]"),
        ({"watch": [WATCH | {"feature": None}]}, "watch[0]"),
        ({"watch": [WATCH | {"feature": True}]}, "watch[0].feature"),
        ({"watch": [{"name": "a", "direction": "north", "sae": "demo"}]}, "watch[0]"),
        ({"watch": [WATCH | {"above": "much"}]}, "watch[0].above"),
        ({"watch": [WATCH | {"op": "ablate"}]}, "watch[0].op"),
        ({"watch": [WATCH | {"when": {"feature": 1}}]}, "watch[0].when"),
        ({"watch": [WATCH | {"when": [{"feature": 1, "above": True}]}]}, "watch[0].when[0].above"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_by_its_path(changed: dict[str, Any], param: str) -> None:
    error = refusal(document(**changed))
    assert error.param == f"$.{param}"
    assert str(error).startswith("expected ") or "String should have" in str(error)


def test_a_policy_that_does_nothing_is_refused() -> None:
    assert "at least one entry" in str(refusal(document(interventions=[])))
    assert "at least one entry" in str(refusal(document(interventions=None)))
    assert parse_policy("no-scam.yaml", document(interventions=None, watch=[WATCH])).watch


def test_a_watch_named_twice_is_refused() -> None:
    assert "each name in `watch` once, got 'flattery' 2 times" in str(
        refusal(document(watch=[WATCH, {**WATCH}]))
    )


def test_the_message_names_the_file_and_the_field() -> None:
    with pytest.raises(PolicyError) as caught:
        parse_policy("no-scam.yml", document(version=0))
    assert str(caught.value) == "no-scam.yml: expected `version` >= 1, got 0 - at $.version"
    with pytest.raises(PolicyError, match=r"^other.yaml: expected `name` to be 'other', the file's own"):
        parse_policy("other.yaml", document())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "a mapping"),
        (b"- 1", "a mapping"),
        (b"name: a\nname: b", "each key once, got `name` again on line 2, column 1"),
        (b"applies: {models: [a], models: [b]}", "each key once"),
        (b"a: &x 1\nb: *x", "no anchors and aliases on line 1"),
        (b"b: *x", "no anchors and aliases"),
        (b"a: !!python/object/apply:os.system [ls]", "no tags"),
        (b"a: !!str 1", "no tags"),
        (b"a: ! 1", "no tags"),
        (b"1: a", "keys to be strings"),
        (b"null: a", "keys to be strings"),
        (b"? [a]\n: b", "keys to be strings"),
        (b"? {a: b}\n: b", "keys to be strings"),
        (b"a: 1\n---\nb: 2", "single document"),
        (b"[" * 100_000, "at most 16 levels"),
        (b"a: {" * 50_000, "at most 16 levels"),
        (b"a: [" + b"b," * 30_000 + b"]", "at most 20000 keys and values"),
        (b"owner: \xff", "expected UTF-8, got byte 0xff at offset 7"),
        (b"owner: \x00", "unacceptable character"),
        (b'owner: "\\ud800"', "no lone surrogates"),
        (b"version: " + b"9" * 5000, "integer string conversion"),
        (b"a: 'b", "quoted scalar"),
        (b"\ta: b", "cannot start any token"),
        (b"#" * (MAX_BYTES + 1), f"at most {MAX_BYTES} bytes"),
    ],
)
def test_yaml_that_hides_repeats_or_breaks_something_is_refused(content: bytes, said: str) -> None:
    assert said in str(refusal(content))


@pytest.mark.parametrize(
    "value", ["010", "1_0", "0x10", "0b1", "1:30", "2020-01-01", "yes", "off", "<<", "="]
)
def test_a_scalar_that_yaml_1_1_would_reinterpret_stays_a_string(value: str) -> None:
    content = document(interventions=None) + f"interventions: [{{feature: {value}, op: ablate}}]\n".encode()
    assert parse_policy("no-scam.yaml", content).interventions[0].feature == value


@pytest.mark.parametrize(
    ("value", "number"), [("1e3", 1000), ("-2.5", -2.5), ("+4", 4), ("1.e-1", 0.1), ("0", 0)]
)
def test_numbers_are_read_as_json_would(value: str, number: float) -> None:
    content = (
        document(interventions=None) + f"interventions: [{{feature: 1, op: add, value: {value}}}]\n".encode()
    )
    assert parse_policy("no-scam.yaml", content).interventions[0].value == number


_plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_fields = st.sampled_from(
    [*Policy.model_fields, "scopes", "models", "feature", "op", "value", "when", "above"]
)
_near = st.dictionaries(_fields, _plain | st.dictionaries(_fields, _plain, max_size=4), max_size=8)
_texts = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.text(alphabet="abn:-[]{}&*!|>'\"#%@? \n\t,0.\\u", max_size=80).map(str.encode),
    (_plain | _near).map(
        lambda value: yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    ),
)


@given(_texts)
def test_any_bytes_are_parsed_or_refused_with_the_file_named(content: bytes) -> None:
    refused = None
    try:
        parse_policy("no-scam.yaml", content)
    except PolicyError as error:
        refused = error
    assert refused is None or str(refused).startswith("no-scam.yaml: ")


@given(_near)
def test_any_change_of_a_sound_document_is_parsed_or_refused(changed: dict[str, Any]) -> None:
    content = document(**changed)
    try:
        policy = parse_policy("no-scam.yaml", content)
    except PolicyError as error:
        assert str(error).encode()  # noqa: PT017
        return
    assert (policy.name, policy.text.encode()) == ("no-scam", content)
