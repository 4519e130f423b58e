"""One key as the file holds it: who has it, what it may do, and the hash of its secret."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cached_property
from typing import Annotated

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from steerserve.errors import KeyFileError

from .hashing import DEFAULT_COST, HASH_BYTES, SALT_BYTES, Cost, hash_secret, matches, new_salt
from .key_text import ID_PATTERN, KeyText
from .limits import Limits
from .principal import BUILT_IN, Principal, ScopeName

__all__ = ["KeyEntry", "first_problem", "new_entry"]

_MAX_HASH_MEMORY = 1 << 27
_SAY_IT_THEMSELVES = ("extra_forbidden", "missing", "value_error")


def _moment(value: object) -> object:
    """YAML reads an unquoted date-time as one; a quoted one comes as text."""
    return datetime.fromisoformat(value) if isinstance(value, str) else value


_Moment = Annotated[AwareDatetime, BeforeValidator(_moment)]


def _own_name(text: str) -> str:
    if text in BUILT_IN:
        raise ValueError(f"expected a name that is not one of the server's own, got {text!r}")
    return text


class KeyEntry(BaseModel):
    """One key. A field that is not known here is refused: it may be a limit that nobody would enforce."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    id: str = Field(pattern=f"^{ID_PATTERN}$")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"), AfterValidator(_own_name)]
    scopes: Annotated[tuple[ScopeName, ...], Field(strict=False, min_length=1)]
    limits: Limits = Limits()
    created: _Moment
    expires: _Moment | None = None
    salt: str = Field(pattern=rf"^[0-9a-f]{{{2 * SALT_BYTES}}}$")
    hash: str = Field(pattern=rf"^[0-9a-f]{{{2 * HASH_BYTES}}}$")
    n: int = Field(DEFAULT_COST.n, ge=2**10, le=2**20)
    r: int = Field(DEFAULT_COST.r, ge=1, le=64)
    p: int = Field(DEFAULT_COST.p, ge=1, le=16)

    @model_validator(mode="after")
    def _can_be_hashed(self) -> KeyEntry:
        if self.n & (self.n - 1):
            raise ValueError(f"expected `n` to be a power of two, got {self.n}")
        if self.cost.memory > _MAX_HASH_MEMORY:
            raise ValueError(
                f"expected a hash of at most {_MAX_HASH_MEMORY} bytes, 128·n·r, got {self.cost.memory}"
            )
        return self

    @property
    def cost(self) -> Cost:
        """scrypt's parameters."""
        return Cost(self.n, self.r, self.p)

    @cached_property
    def principal(self) -> Principal:
        """Who holds the key."""
        return Principal(self.name, frozenset(self.scopes), self.limits)

    @property
    def has_expired(self) -> bool:
        """Whether its time is over."""
        return self.expires is not None and datetime.now(UTC) >= self.expires

    def opens_with(self, secret: str) -> bool:
        """Whether this is the key's secret. Takes tens of milliseconds: not for an event loop."""
        return matches(secret, bytes.fromhex(self.salt), self.cost, bytes.fromhex(self.hash))


def new_entry(
    key: KeyText, name: str, scopes: tuple[ScopeName, ...], limits: Limits, expires: datetime | None = None
) -> KeyEntry:
    """The entry of a key, as created now.

    Raises: KeyFileError if a field is not one that the file may hold.
    """
    salt = new_salt()
    digest = hash_secret(key.secret, salt, DEFAULT_COST)
    created = datetime.now(UTC).replace(microsecond=0)
    try:
        return KeyEntry(
            id=key.id,
            name=name,
            scopes=scopes,
            limits=limits,
            created=created,
            expires=expires,
            salt=salt.hex(),
            hash=digest.hex(),
        )
    except ValidationError as error:
        raise KeyFileError(first_problem(error)) from None


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong, with its place; never what came where a key may have been pasted."""
    problem = error.errors(include_url=False)[0]
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])
    place = "".join(parts).removeprefix(".")
    name = place.rpartition(".")[2][:64]
    if problem["type"] == "missing":
        return f"expected `{name}`, which is missing - at {place}"
    if problem["type"] == "extra_forbidden":
        return f"expected no key `{name}`, which is not known here - at {place}"
    said = str(problem["msg"]).removeprefix("Value error, ").replace("Input should ", "expected to ", 1)
    silent = problem["type"] in _SAY_IT_THEMSELVES or place.endswith((".id", ".salt", ".hash"))
    got = "" if silent else f", got {str(problem['input'])[:64]!r}"
    return f"{said}{got}" + (f" - at {place}" if place else "")
