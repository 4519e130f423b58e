import pytest
from pydantic import ValidationError

from steerserve.access.limits import Limits
from steerserve.access.principal import ANYONE, NOBODY, SCOPES


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"other": 1}, "Extra inputs"),
        ({"ops": ["melt"]}, "'clamp'"),
        ({"ops": "clamp"}, "tuple"),
        ({"saes": ["a b"]}, "pattern"),
        ({"saes": ["sae:demo"]}, "pattern"),
        ({"features": {"direction:french": [[0, 1]]}}, "pattern"),
        ({"features": {"demo": [[5, 5]]}}, r"ranges \[start, stop\)"),
        ({"features": {"demo": [[-1, 5]]}}, "greater than"),
        ({"features": {"demo": [[0]]}}, "Field required"),
        ({"features": {"demo": [[0, 1.0]]}}, "integer"),
        ({"features": {"demo": [[0, 1]]}, "saes": ["other"]}, "among `saes`"),
        ({"max_value": float("nan")}, "finite"),
        ({"max_value": -1.0}, "greater than"),
        ({"max_value": True}, "number"),
        ({"max_interventions": 1.0}, "integer"),
        ({"requests_per_minute": 0}, "greater than"),
    ],
)
def test_a_limit_that_means_nothing_is_refused(limits: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Limits.model_validate(limits)


def test_limits_are_frozen_and_lists_become_tuples() -> None:
    limits = Limits.model_validate({"features": {"demo": [[0, 2]]}, "ops": ["add"]})
    assert limits.features == {"demo": ((0, 2),)}
    assert limits.ops == ("add",)
    with pytest.raises(ValidationError, match="frozen"):
        limits.max_value = 3.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("limits", "sources"),
    [
        ({}, None),
        ({"saes": []}, ()),
        ({"features": {"demo": [[0, 1]]}}, ("demo",)),
        (
            {"features": {"demo": [[0, 1]]}, "saes": ["direction:french", "demo"]},
            ("direction:french", "demo"),
        ),
    ],
)
def test_features_alone_name_the_only_saes(
    limits: dict[str, object], sources: tuple[str, ...] | None
) -> None:
    assert Limits.model_validate(limits).sources == sources


def test_anyone_may_everything_and_nobody_nothing() -> None:
    assert ANYONE.scopes == set(SCOPES) == {"infer", "steer", "inspect", "admin"}
    assert not NOBODY.scopes
    assert ANYONE.limits == Limits()
