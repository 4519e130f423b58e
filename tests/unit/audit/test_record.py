from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from steerserve.audit import PolicyUse, Record, Watched, trace_id_of
from steerserve.audit.chain import GENESIS, canonical, link
from steerserve.audit.lines import LinkedRecord

anything = st.text(st.characters(codec=None), max_size=300)
digests = st.text("0123456789abcdef", min_size=8, max_size=64)
counts = st.integers(0, 2**63 - 1)
finite = st.floats(allow_nan=False, allow_infinity=False)
watched = st.builds(Watched, tokens=counts, fired=counts, above=finite, max=st.none() | finite)
uses = st.builds(PolicyUse, name=anything, version=counts, mode=st.sampled_from(["enforce", "shadow", "off"]))
requests = st.builds(
    Record,
    event=st.just("request"),
    request_id=st.none() | anything,
    trace_id=st.none() | st.text("0123456789abcdef", min_size=32, max_size=32),
    principal=st.none() | anything,
    route=st.none() | anything,
    model=st.none() | anything,
    outcome=st.sampled_from(["ok", "refused", "aborted", "failed", "left", None]),
    status=st.none() | st.integers(100, 599),
    reason=st.none() | anything,
    plan=st.none() | digests,
    policies=st.lists(uses, max_size=3).map(tuple),
    saes=st.dictionaries(anything, digests, max_size=3),
    tokens=counts,
    watched=st.dictionaries(anything, watched, max_size=3),
)
changes = st.builds(Record, event=st.sampled_from(["policy", "keys", "start", "stop"]), detail=anything)
records = requests | changes


@given(records)
def test_any_record_comes_back_from_its_line(record: Record) -> None:
    line = link(record.model_dump(), GENESIS)
    back = LinkedRecord.model_validate_json(line)
    assert back.model_dump(exclude={"seq", "prev"}) == record.model_dump()
    assert canonical(back.model_dump()) == line


@given(requests)
def test_no_word_of_free_text_stands_in_the_record_of_a_request(record: Record) -> None:
    for text in strings_in(json.loads(record.model_dump_json())):
        assert re.fullmatch(r"[\x21-\x7e]{0,128}", text), "a name, without a space or a line break"


def strings_in(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in strings_in(part)]
    if isinstance(value, list):
        return [text for part in value for text in strings_in(part)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("text", ["tell me a secret", "x" * 129, "", "línea", "a\nb", "\ud800", "-rf", "<b>"])
def test_what_is_no_name_is_kept_as_its_hash(text: str) -> None:
    kept = Record(event="request", request_id=text).request_id
    assert kept is not None
    assert re.fullmatch("sha256:[0-9a-f]{32}", kept)
    assert kept != Record(event="request", request_id=text + "!").request_id
    assert Record(event="request", request_id=kept).request_id == kept


@pytest.mark.parametrize(
    "name",
    ["chatcmpl-1", "/v1/chat/completions", "org/model", "$.steering.interventions[2].feature", "a@b.c"],
)
def test_names_are_kept_as_they_are(name: str) -> None:
    assert Record(event="request", request_id=name).request_id == name


def test_a_request_has_no_words() -> None:
    with pytest.raises(ValidationError, match="expected no `detail` of a request"):
        Record(event="request", detail="the prompt was: hello")


def test_the_words_of_a_change_are_one_short_printable_line() -> None:
    detail = Record(event="policy", detail="a\n\x1b[31m" + "x" * 500).detail
    assert detail == "a??[31m" + "x" * 249


@pytest.mark.parametrize(
    "field",
    [
        {"prompt": "hello"},
        {"event": "other"},
        {"outcome": "fine"},
        {"status": 42},
        {"plan": "hello"},
        {"trace_id": "ab"},
        {"saes": {"demo": "not hex"}},
        {"tokens": -1},
        {"tokens": True},
        {"time": "yesterday"},
        {"time": "2026-13-01T00:00:00.000000Z"},
        {"watched": {"a/b": {"tokens": 1, "fired": 1, "above": float("nan")}}},
        {"policies": ({"name": "a", "version": 1, "mode": "maybe"},)},
    ],
)
def test_nothing_else_comes_in(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Record.model_validate({"event": "request", **field})


@pytest.mark.parametrize(
    ("header", "trace_id"),
    [
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "4bf92f3577b34da6a3ce929d0e0e4736"),
        (
            " 01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00-more ",
            "4bf92f3577b34da6a3ce929d0e0e4736",
        ),
        ("00-00000000000000000000000000000000-00f067aa0ba902b7-01", None),
        ("00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01", None),
        ("hello", None),
        ("", None),
        (None, None),
    ],
)
def test_a_trace_id_is_read_from_a_sound_traceparent_alone(header: str | None, trace_id: str | None) -> None:
    assert trace_id_of(header) == trace_id
