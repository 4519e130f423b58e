import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerserve.access.key_text import KeyText, new_key_text, split_key_text

KEY = KeyText("0123456789ab", "s" * 43)


def test_a_new_key_is_its_own_inverse_and_holds_32_random_bytes() -> None:
    key = new_key_text()
    assert split_key_text(str(key)) == key
    assert re.fullmatch(r"sk-steer-[0-9a-f]{12}-[A-Za-z0-9_-]{43}", str(key))


def test_no_two_keys_share_an_id_or_a_secret() -> None:
    keys = [new_key_text() for _ in range(200)]
    assert len({key.id for key in keys}) == len({key.secret for key in keys}) == 200


def test_a_secret_may_hold_hyphens() -> None:
    key = KeyText("0123456789ab", "-" * 43)
    assert split_key_text(str(key)) == key


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sk-steer-",
        f"{KEY}\n",
        f" {KEY}",
        f"{KEY}x",
        str(KEY)[:-1],
        str(KEY).upper(),
        str(KEY).replace("sk-steer", "sk"),
        f"sk-steer-0123456789aB-{'s' * 43}",
        f"sk-steer-0123456789ab-{'é' * 43}",
        f"sk-steer-٠123456789ab-{'s' * 43}",
    ],
)
def test_what_differs_in_any_character_is_no_key(text: str) -> None:
    assert split_key_text(text) is None


@given(st.text())
def test_any_text_is_a_key_or_none(text: str) -> None:
    found = split_key_text(text)
    assert found is None or str(found) == text
