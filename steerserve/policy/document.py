"""One policy: what it does, to which requests, who answers for it. Parsed strictly from one YAML file."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from steerserve.errors import PolicyError, RequestError
from steerserve.spec import Condition, FeatureRef, Intervention, Name, Value, Where, first_problem

from .yaml_text import read_yaml

__all__ = ["MAX_BYTES", "Applies", "Mode", "Policy", "Watch", "parse_policy", "read_policy"]

Mode = Literal["enforce", "shadow", "off"]

MAX_BYTES = 262_144
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SCOPE = re.compile(r"infer|steer|inspect|admin|key:.{1,128}")


def _named(text: str) -> str:
    if _NAME.fullmatch(text) is None:
        wanted = "1 to 64 of a-z, 0-9, `.`, `_` and `-`, the first a letter or digit"
        raise ValueError(f"expected a name of {wanted}, got {text[:80]!r}")
    return text


def _said(text: str) -> str:
    if not text.strip():
        raise ValueError("expected a text that is not blank")
    return text


def _scope(text: str) -> str:
    if _SCOPE.fullmatch(text) is None:
        wanted = "infer, steer, inspect, admin or key:NAME"
        raise ValueError(f"expected a scope, one of {wanted}, got {text[:80]!r}")
    return text


def _route(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError(f"expected a route's path, such as /v1/chat/completions, got {text[:80]!r}")
    return text


PolicyName = Annotated[str, AfterValidator(_named)]
Words = Annotated[str, Field(max_length=4096), AfterValidator(_said)]
Scopes = list[Annotated[str, AfterValidator(_scope)]]
Routes = list[Annotated[str, Field(max_length=256), AfterValidator(_route)]]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Applies(_Strict):
    """Which requests a policy is for. An empty list sets no limit; every list that is given must match."""

    scopes: Scopes = Field(default_factory=list, max_length=256)
    models: list[Name] = Field(default_factory=list, max_length=256)
    routes: Routes = Field(default_factory=list, max_length=256)

    def match(
        self, model: str | None, route: str | None, scopes: frozenset[str], key: str | None = None
    ) -> bool:
        """Whether a request is among them. None, or no scopes, is what no limit matches.

        Args:
            model: the model's name.
            route: the path it came by; None for an offline engine.
            scopes: what its key may do; empty for an offline engine.
            key: its key's name; None for an offline engine, or where no key is asked for.
        """
        held = scopes if key is None else scopes | {f"key:{key}"}
        return (
            (not self.scopes or not held.isdisjoint(self.scopes))
            and (not self.models or model in self.models)
            and (not self.routes or route in self.routes)
        )


class Watch(_Strict):
    """Counts the tokens on which a feature or direction lies above a bound (raw units), and changes none."""

    name: PolicyName
    sae: Name | None = None
    feature: FeatureRef | None = None
    direction: Name | None = None
    above: Value = 0.0
    where: Where = Where()
    when: Condition | Annotated[list[Condition], Field(max_length=16)] = Field(default_factory=list)

    @model_validator(mode="after")
    def _watches_one_thing(self) -> Watch:
        if (self.feature is None) == (self.direction is None):
            raise ValueError("expected exactly one of `feature` and `direction`")
        if self.direction is not None and self.sae is not None:
            raise ValueError("expected no `sae` beside `direction`")
        return self

    @property
    def conditions(self) -> list[Condition]:
        """The conditions as a list, however many were written."""
        return self.when if isinstance(self.when, list) else [self.when]


class Policy(_Strict):
    """One document. `interventions` are changes as requests ask for them, `watch` changes nothing."""

    name: PolicyName
    version: int = Field(ge=1, lt=2**53)
    mode: Mode
    owner: Words
    reason: Words
    applies: Applies = Applies()
    interventions: list[Intervention] = Field(default_factory=list, max_length=1024)
    watch: list[Watch] = Field(default_factory=list, max_length=256)
    _content: bytes = PrivateAttr(b"")

    @model_validator(mode="after")
    def _does_something(self) -> Policy:
        if not self.interventions and not self.watch:
            raise ValueError("expected at least one entry in `interventions` or `watch`")
        repeated, times = (
            Counter(watch.name for watch in self.watch).most_common(1)[0] if self.watch else ("", 0)
        )
        if times > 1:
            raise ValueError(f"expected each name in `watch` once, got {repeated!r} {times} times")
        return self

    @property
    def text(self) -> str:
        """The document as it was written."""
        return self._content.decode()

    @property
    def sha256(self) -> str:
        """Of the bytes of the document, in hex."""
        return hashlib.sha256(self._content).hexdigest()

    @property
    def etag(self) -> str:
        """The strong validator of the document, quoted as HTTP wants it."""
        return f'"{self.sha256}"'


def parse_policy(file: str, content: bytes) -> Policy:
    """The policy in a file called `file`, whose name it bears.

    Raises: PolicyError naming the file and the field.
    """
    try:
        return read_policy(file.rpartition(".")[0], content)
    except RequestError as error:
        raise PolicyError(f"{file}: {error}") from None


def read_policy(name: str, content: bytes) -> Policy:
    """The policy called `name`, of its document.

    Raises: RequestError naming the field.
    """
    if len(content) > MAX_BYTES:
        raise RequestError(
            f"expected at most {MAX_BYTES} bytes, got {len(content)}", at=(), reason="too_large"
        )
    document = read_yaml(content)
    if not isinstance(document, dict):
        raise RequestError("expected a mapping with `name`, `version`, `mode` and so on", at=())
    try:
        policy = Policy.model_validate(document)
    except ValidationError as error:
        raise first_problem(error, (), _FIELDS) from None
    if policy.name != name:
        raise RequestError(
            f"expected `name` to be {name!r}, the file's own, got {policy.name!r}", at=("name",)
        )
    policy._content = content
    return policy


_FIELDS = {
    name for model in (Policy, Applies, Watch, Intervention, Where, Condition) for name in model.model_fields
}
