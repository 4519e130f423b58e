"""What the operator wrote wrong is one sentence as well."""

from __future__ import annotations

import re
from typing import Any

import pytest

from steerserve.config import parse_config
from steerserve.errors import ConfigError

SAE = {"name": "a", "path": "x"}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"sae": []},
            "expected no key `sae`, which is not known here, got a list of 0; did you mean `saes`?",
        ),
        ({"saes": [SAE | {"name": "a b"}]}, "expected `name` to match ^[A-Za-z0-9]"),
        ({"saes": [SAE | {"path": 3}]}, "expected `path` to be a path, got 3 - at $.steerserve.saes[0].path"),
        ({"saes": [SAE | {"layer": -1}]}, "expected `layer` >= 0, got -1"),
        ({"saes": [SAE | {"layer": "x"}]}, 'expected `layer` to be a whole number, got "x"'),
        ({"saes": [SAE | {"resident": "maybe"}]}, 'expected `resident` to be a boolean, got "maybe"'),
        ({"saes": [{"name": "a"}]}, "expected `path`, which is missing - at $.steerserve.saes[0].path"),
        ({"saes": [SAE, SAE]}, "expected unique names in `saes`, got ['a'] more than once"),
        ({"max_interventions": 65}, "expected `max_interventions` <= 64, got 65"),
        (5, "expected `steerserve` to be an object, got 5"),
    ],
)
def test_a_fault_of_the_configuration_is_one_sentence_with_its_place(config: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"steerserve": config})
    assert says in str(caught.value)
    assert re.fullmatch(
        r"expected [^\n]* - at \$\.steerserve[^\n]* of the additional config", str(caught.value)
    )
