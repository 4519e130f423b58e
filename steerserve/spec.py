"""The wire schema of the `steering` object, parsed once and strictly.

Everything deeper in the system sees a frozen `SteeringSpec` and checks nothing of its shape again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import RequestError
from .hints import hint_for

__all__ = [
    "EVERYWHERE",
    "Condition",
    "Intervention",
    "SteeringSpec",
    "Where",
    "first_problem",
    "kind_of",
    "parse_spec",
    "parse_spec_json",
]

Op = Literal["clamp", "ablate", "scale", "add", "at_least", "at_most"]
Phase = Literal["all", "prompt", "generation"]

MAX_JSON_CHARS = 262_144
MAX_SELECTORS = 4096

# A clamp far outside float32's useful range would overflow in the sum over rows. The bound is in raw units:
# what is given in multiples of a feature's maximum meets it again once that is known.
MAX_VALUE = 1e6
Value = Annotated[float, Field(ge=-MAX_VALUE, le=MAX_VALUE)]
Position = Annotated[int, Field(ge=-(2**31), lt=2**31)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
FeatureRef = Annotated[int, Field(ge=0, lt=2**31)] | Annotated[str, Field(min_length=1, max_length=256)]
Name = Annotated[str, Field(min_length=1, max_length=128)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Condition(_Strict):
    """Holds for a token while another feature's activation lies above, or below, a bound (strictly)."""

    feature: FeatureRef
    sae: Name | None = None
    above: Value | None = None
    below: Value | None = None

    @model_validator(mode="after")
    def _has_a_bound(self) -> Condition:
        if self.above is None and self.below is None:
            raise ValueError("expected `above` or `below`, a bound on the feature, got neither")
        if self.above is not None and self.below is not None and self.above >= self.below:
            raise ValueError(f"expected `above` < `below`, got {self.above} and {self.below}")
        return self


class Where(_Strict):
    """Which of a request's token positions a row applies to."""

    phase: Phase = "all"
    start: Position | None = None
    stop: Position | None = None
    positions: list[Position] | None = Field(None, min_length=1, max_length=MAX_SELECTORS)
    tokens: list[TokenId] | None = Field(None, min_length=1, max_length=MAX_SELECTORS)
    exclude_positions: list[Position] = Field(default_factory=list, max_length=MAX_SELECTORS)
    exclude_tokens: list[TokenId] = Field(default_factory=list, max_length=MAX_SELECTORS)
    special_tokens: bool = False


EVERYWHERE = Where()


class Intervention(_Strict):
    """One change to one feature of an SAE, or to one named direction; or, with `then: "abort"`, an end.

    With `latch`, once the conditions hold at a position of the window, the row applies there and at every
    later position of the window. With `then: "abort"` the request ends at the first position of the window
    where they hold.
    """

    sae: Name | None = None
    feature: FeatureRef | None = None
    direction: Name | None = None
    op: Op | None = None
    value: Value | None = None
    unit: Literal["raw", "max"] = "raw"
    only_if_active: bool = False
    # Shared, for it is frozen: pydantic would copy a default, deeply, for every intervention.
    where: Where = Field(default_factory=lambda: EVERYWHERE)
    when: Condition | Annotated[list[Condition], Field(max_length=16)] = Field(default_factory=list)
    latch: bool = False
    then: Literal["apply", "abort"] = "apply"

    @model_validator(mode="after")
    def _is_whole(self) -> Intervention:
        if self.then == "abort":
            self._ends_the_request()
            return self
        if self.op is None:
            raise ValueError(f"expected `op`, one of {', '.join(get_args(Op))}, which is missing")
        if self.latch and not (self.conditions or self.only_if_active):
            raise ValueError("expected `when` beside `latch`, which waits for a condition")
        if (self.feature is None) == (self.direction is None):
            got = "neither" if self.feature is None else "both"
            raise ValueError(f"expected exactly one of `feature` and `direction`, got {got}")
        if self.direction is not None and self.sae is not None:
            raise ValueError("expected no `sae` beside `direction`")
        if self.op == "ablate" and self.value is not None:
            raise ValueError(f"expected no `value` for op `ablate`, got {self.value}")
        if self.op != "ablate" and self.value is None:
            raise ValueError(f"expected a `value` for op `{self.op}`, which is missing")
        if self.unit == "max" and self.op in ("scale", "ablate"):
            raise ValueError(f'expected `unit` "raw" for op `{self.op}`, whose value is not an activation')
        return self

    def _ends_the_request(self) -> None:
        if not self.conditions:
            raise ValueError('expected `when` beside `then` "abort", which waits for a condition')
        for name in ("sae", "feature", "direction", "op", "value"):
            if getattr(self, name) is not None:
                raise ValueError(f'expected no `{name}` beside `then` "abort", which changes nothing')
        if self.latch or self.only_if_active or self.unit != "raw":
            raise ValueError('expected neither `latch`, `only_if_active` nor `unit` beside `then` "abort"')

    @property
    def conditions(self) -> list[Condition]:
        """The conditions as a list, however many were written."""
        return self.when if isinstance(self.when, list) else [self.when]


class SteeringSpec(_Strict):
    """The whole `steering` object of a request."""

    interventions: list[Intervention] = Field(max_length=1024)
    error: Literal["keep", "drop"] = "keep"
    report: bool = True


def parse_spec(value: object) -> SteeringSpec:
    """Validate an already decoded `steering` object.

    Raises: RequestError naming the first offending field.
    """
    if not isinstance(value, dict):
        raise RequestError(
            f'expected `steering` to be an object {{"interventions": […]}}, got {kind_of(value)}'
        )
    try:
        return SteeringSpec.model_validate(value)
    except ValidationError as error:
        raise first_problem(error) from None


def parse_spec_json(text: str) -> SteeringSpec:
    """Validate a `steering` object handed over as JSON text (NaN, infinities and repeated keys refused)."""
    if len(text) > MAX_JSON_CHARS:
        message = f"expected `steering` of at most {MAX_JSON_CHARS} characters, got {len(text)}"
        raise RequestError(message, reason="too_large")
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"expected `steering` to be valid JSON: {error}") from None
    return parse_spec(value)


def _refuse_constant(name: str) -> float:
    raise RequestError(f"expected finite numbers, got {name}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        repeated = counts.most_common(1)[0][0]
        raise RequestError(f"expected each key once, got `{repeated[:64]}` twice")
    return seen


def kind_of(value: object) -> str:
    """What a JSON value is, for a message: "an object", "a list", …"""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


# What each of pydantic's error types means, said as "expected …".
_EXPECTED: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "extra_forbidden": lambda name, _: f"expected no key `{name}`, which is not known here",
    "missing": lambda name, _: f"expected `{name}`, which is missing",
    "finite_number": lambda name, _: f"expected `{name}` to be finite",
    "float_type": lambda name, _: f"expected `{name}` to be a number",
    "int_type": lambda name, _: f"expected `{name}` to be a whole number",
    "int_from_float": lambda name, _: f"expected `{name}` to be a whole number",
    "int_parsing_size": lambda name, _: f"expected `{name}` to be a whole number of a usual size",
    "int_parsing": lambda name, _: f"expected `{name}` to be a whole number",
    "bool_type": lambda name, _: f"expected `{name}` to be a boolean",
    "bool_parsing": lambda name, _: f"expected `{name}` to be a boolean",
    "path_type": lambda name, _: f"expected `{name}` to be a path",
    "string_type": lambda name, _: f"expected `{name}` to be a string",
    "string_unicode": lambda name, _: f"expected `{name}` to be a string of valid Unicode",
    "string_too_long": lambda name, ctx: f"expected `{name}` of at most {ctx['max_length']} characters",
    "string_too_short": lambda name, _: f"expected `{name}` not to be empty",
    "string_pattern_mismatch": lambda name, ctx: f"expected `{name}` to match {ctx['pattern']}",
    "list_type": lambda name, _: f"expected `{name}` to be a list",
    "model_type": lambda name, _: f"expected `{name}` to be an object",
    "invalid_key": lambda name, _: "expected keys that are strings",
    "literal_error": lambda name, ctx: f"expected `{name}` to be one of {ctx['expected']}",
    "too_long": lambda name, ctx: f"expected `{name}` of at most {ctx['max_length']} entries",
    "too_short": lambda name, ctx: f"expected `{name}` of at least {ctx['min_length']} entries",
    "greater_than_equal": lambda name, ctx: f"expected `{name}` >= {ctx['ge']:g}",
    "less_than_equal": lambda name, ctx: f"expected `{name}` <= {ctx['le']:g}",
    "less_than": lambda name, ctx: f"expected `{name}` < {ctx['lt']:g}",
}


# Of a union all members complain; and a key that is not known is often the one that is missing.
_TELLS = {"extra_forbidden": 2, "model_type": 0, "list_type": 0, "string_type": 0}


def first_problem(
    error: ValidationError, root: tuple[str, ...] = ("steering",), fields: Collection[str] | None = None
) -> RequestError:
    """The most telling of what a model refused, as a sentence with its place.

    Args:
        root: where the model's document lies in what the client wrote.
        fields: names of all fields of the model and those inside it; those of `SteeringSpec` by default.
    """
    known = _FIELDS if fields is None else fields
    problems = error.errors(include_url=False, include_context=True)
    problem = max(problems, key=lambda item: _TELLS.get(item["type"], 1))
    path = [part for part in problem["loc"] if isinstance(part, int) or part in known]
    if problem["loc"] and problem["type"] == "extra_forbidden":
        path = [*(part for part in problem["loc"][:-1] if isinstance(part, int) or part in known)]
        path.append(str(problem["loc"][-1])[:64])
    name = next(
        (str(part) for part in reversed(path) if isinstance(part, str)), root[-1] if root else "document"
    )
    shown = f"{name}[{path[-1]}]" if path and isinstance(path[-1], int) else name
    if problem["type"] == "value_error":
        return RequestError(str(problem["ctx"]["error"]), at=(*root, *path))
    if name == "feature" and problem["type"] in ("int_type", "string_type"):
        wanted = "expected `feature` to be an index or a label"
    else:
        say = _EXPECTED.get(problem["type"])
        wanted = say(shown, problem.get("ctx", {})) if say else _plainly(shown, problem["msg"])
    if problem["type"] == "missing":
        return RequestError(wanted, at=(*root, *path))
    hint = hint_for(path, _top(known)) if problem["type"] == "extra_forbidden" else ""
    return RequestError(f"{wanted}, got {_show(problem['input'])}{hint}", at=(*root, *path))


def _top(fields: Collection[str]) -> Collection[str]:
    """The fields at the top of a document: those of a request, or those of no entry of one."""
    if fields is _FIELDS:
        return SteeringSpec.model_fields
    inside = (Intervention, Where, Condition)
    return [name for name in fields if not any(name in model.model_fields for model in inside)]


def _plainly(name: str, message: str) -> str:
    """Of a pydantic error that has no words of its own here."""
    return f"expected a valid `{name}` ({message[:1].lower()}{message[1:]})"


def _show(value: object) -> str:
    if isinstance(value, dict | list):
        return kind_of(value) + f" of {len(value)}"
    text = json.dumps(value, default=str) if not isinstance(value, float) else repr(value)
    return text if len(text) <= 64 else text[:61] + "..."


_FIELDS = {name for model in (SteeringSpec, Intervention, Where, Condition) for name in model.model_fields}
