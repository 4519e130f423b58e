"""What vLLM answers with a line for every form that an extra argument might have, in one sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest

from steerserve.errors import RequestError
from steerserve.server.body import take_steering


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ({"interventions": []}, "an object"),
        ([1], "a list"),
        (None, "null"),
        (3, "a number"),
        (True, "a boolean"),
    ],
)
def test_steering_by_xargs_that_is_no_text_is_refused_in_one_sentence(value: Any, got: str) -> None:
    body = json.dumps({"prompt": "x", "vllm_xargs": {"steering": value}}).encode()
    with pytest.raises(RequestError) as refused:
        take_steering(body, "application/json", "/v1/completions")
    assert str(refused.value) == (
        f"expected `vllm_xargs.steering` to be a string of JSON, got {got}: put `steering` at the top of the "
        "body instead, or its JSON text here - at $.vllm_xargs.steering"
    )


def test_text_is_read_as_what_it_says() -> None:
    body = json.dumps({"prompt": "x", "vllm_xargs": {"steering": "{}"}}).encode()
    taken = take_steering(body, "application/json", "/v1/completions")
    assert taken == ({}, {"prompt": "x", "vllm_xargs": {}})
