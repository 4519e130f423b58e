from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from steerserve.access.hashing import DEFAULT_COST
from steerserve.access.key_entry import first_problem, new_entry
from steerserve.access.key_text import KeyText
from steerserve.access.limits import Limits
from steerserve.errors import KeyFileError

from .conftest import make_entry


def test_a_new_entry_opens_with_its_key_alone_at_the_default_cost(key: KeyText) -> None:
    entry = new_entry(key, "team", ("infer",), Limits())
    assert entry.cost == DEFAULT_COST
    assert entry.opens_with(key.secret)
    assert not entry.opens_with(key.secret[::-1])
    assert key.secret not in entry.model_dump_json()


def test_two_entries_of_one_key_share_no_hash(key: KeyText) -> None:
    one, other = (new_entry(key, "team", ("infer",), Limits()) for _ in range(2))
    assert one.salt != other.salt
    assert one.hash != other.hash


@pytest.mark.parametrize("name", ["", "a b", "a\n", "-a", "é", "x" * 129, "a/b", "anyone", "api-key"])
def test_a_name_that_cannot_stand_in_a_log_or_is_the_servers_own_is_refused(key: KeyText, name: str) -> None:
    with pytest.raises(KeyFileError, match="at name"):
        new_entry(key, name, ("infer",), Limits())


def test_a_key_without_scopes_is_refused(key: KeyText) -> None:
    with pytest.raises(KeyFileError, match="at scopes"):
        new_entry(key, "team", (), Limits())


def test_a_key_expires_at_its_moment(key: KeyText) -> None:
    now = datetime.now(UTC)
    assert make_entry(key, expires=now).has_expired
    assert make_entry(key, expires=now.isoformat()).has_expired
    assert not make_entry(key, expires=now + timedelta(days=1)).has_expired
    assert not make_entry(key).has_expired


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"n": 1000}, "n"),
        ({"n": 1025}, "power of two"),
        ({"n": 2**20, "r": 64}, "at most 134217728 bytes"),
        ({"n": 2**21}, "at n"),
        ({"r": 0}, "at r"),
        ({"p": 17}, "at p"),
        ({"scopes": ["root"]}, r"at scopes\[0\]"),
        ({"scopes": []}, "at scopes"),
        ({"expires": "2030-01-01"}, "at expires"),
        ({"expires": "2030-01-01T00:00:00"}, "at expires"),
        ({"expires": "soon"}, "at expires"),
        ({"expires": 7}, "at expires"),
        ({"limits": {"ops": ["melt"]}}, r"at limits.ops\[0\]"),
        ({"limits": None}, "at limits"),
        ({"limit": {}}, "at limit"),
        ({"name": 7}, "at name"),
    ],
)
def test_a_field_that_is_wrong_is_named(key: KeyText, fields: dict[str, object], place: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make_entry(key, **fields)
    with pytest.raises(KeyFileError, match=place):
        raise KeyFileError(first_problem(caught.value))


def test_the_time_zone_of_an_expiry_counts(key: KeyText) -> None:
    moment = datetime.now(UTC) + timedelta(hours=1)
    ahead = moment.replace(tzinfo=None).isoformat()
    assert make_entry(key, expires=f"{ahead}+05:00").has_expired
    assert not make_entry(key, expires=f"{ahead}Z").has_expired


def test_who_holds_a_key_is_the_same_object_each_time(key: KeyText) -> None:
    entry = make_entry(key, scopes=["infer", "steer"], limits={"max_value": 2.0})
    assert entry.principal is entry.principal
    assert entry.principal.scopes == {"infer", "steer"}
    assert entry.principal.limits == Limits(max_value=2.0)
    assert entry == make_entry(key, scopes=["infer", "steer"], limits={"max_value": 2.0})
