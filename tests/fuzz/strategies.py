"""Documents that are nearly right: every known key, with values that are right, wrong or absurd."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

__all__ = ["AUDIT_LINES", "JSON", "KEY_FILES", "POLICIES", "SPECS", "mutated"]

ODD: SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 7, 2**31, 2**63, -(10**400), 1e6, -1e6, 1e300, float("nan"), float("inf")])
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["", "demo", "\x00", "\ud800", "\u2028", "a" * 300, "legal"])
)
JSON: SearchStrategy[Any] = st.recursive(
    ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


def near(**fields: SearchStrategy[Any]) -> SearchStrategy[dict[str, Any]]:
    """An object of these fields, each left out or odd at times, and now and then one too many."""
    chosen = {name: value | JSON if _odd(name) else value for name, value in fields.items()}
    whole = st.fixed_dictionaries({}, optional=chosen)
    extra = st.dictionaries(st.text(max_size=5), JSON, max_size=1)
    return st.one_of(whole, whole, st.builds(lambda one, two: {**two, **one}, whole, extra))


def _odd(name: str) -> bool:
    return name not in ("interventions", "name", "version")


def mutated(content: bytes) -> SearchStrategy[bytes]:
    """The bytes with some of them changed, cut or doubled."""
    places = st.integers(0, max(0, len(content) - 1))
    edits = st.lists(st.tuples(places, st.binary(max_size=4)), max_size=4)

    def apply(changes: list[tuple[int, bytes]], end: int) -> bytes:
        found = bytearray(content)
        for place, new in changes:
            found[place : place + len(new)] = new
        return bytes(found[: len(content) - end])

    return st.builds(apply, edits, st.just(0) | st.integers(0, len(content)))


FEATURES = st.sampled_from([0, 1, 5, 127, 128, "legal", "nothing"])
NAMES = st.sampled_from(["jump", "std", "gate", "absent"])
NUMBERS = st.sampled_from([0, -1, 2.5, 1e6, -1e6, 1e6 + 1, 5e-324])
POSITIONS = st.integers(-5, 5) | st.sampled_from([2**31 - 1, -(2**31)])
CONDITIONS = near(feature=FEATURES, sae=NAMES, above=NUMBERS, below=NUMBERS)
WHERE = near(
    phase=st.sampled_from(["all", "prompt", "generation", "now"]),
    start=POSITIONS,
    stop=POSITIONS,
    positions=st.lists(POSITIONS, max_size=4),
    tokens=st.lists(st.integers(-1, 400), max_size=4),
    exclude_positions=st.lists(POSITIONS, max_size=4),
    exclude_tokens=st.lists(st.integers(-1, 400), max_size=4),
    special_tokens=st.booleans(),
)
CHANGES = near(
    sae=NAMES,
    feature=FEATURES,
    direction=st.sampled_from(["north", "south"]),
    op=st.sampled_from(["clamp", "ablate", "scale", "add", "at_least", "at_most"]),
    value=NUMBERS,
    unit=st.sampled_from(["raw", "max"]),
    only_if_active=st.booleans(),
    where=WHERE,
    when=CONDITIONS | st.lists(CONDITIONS, max_size=3),
    latch=st.booleans(),
    then=st.sampled_from(["apply", "abort"]),
)
_SOUND = st.fixed_dictionaries(
    {"sae": st.sampled_from(["jump", "std", "gate"]), "feature": st.integers(0, 127), "op": st.just("clamp")},
    optional={"where": WHERE, "when": CONDITIONS, "latch": st.booleans()},
).map(lambda change: {**change, "value": 1.0})
SPECS = near(
    interventions=st.lists(_SOUND | CHANGES, max_size=4),
    error=st.sampled_from(["keep", "drop"]),
    report=st.booleans(),
)
POLICIES = near(
    name=st.sampled_from(["hold", "other"]),
    version=st.integers(-1, 5) | st.just(2**53),
    mode=st.sampled_from(["enforce", "shadow", "off"]),
    owner=st.text(max_size=5),
    reason=st.text(max_size=5),
    applies=near(
        scopes=st.lists(st.sampled_from(["infer", "key:a", "root"]), max_size=2),
        models=st.lists(st.text(max_size=3), max_size=2),
        routes=st.lists(st.sampled_from(["/v1/completions", "v1"]), max_size=2),
    ),
    interventions=st.lists(_SOUND | CHANGES, max_size=3),
    watch=st.lists(
        near(
            name=st.sampled_from(["a", "b", "-"]),
            sae=NAMES,
            feature=FEATURES,
            direction=st.just("north"),
            above=NUMBERS,
            where=WHERE,
            when=CONDITIONS,
        ),
        max_size=2,
    ),
)
_LIMITS = near(
    saes=st.lists(NAMES, max_size=2),
    ops=st.lists(st.sampled_from(["clamp", "melt"]), max_size=2),
    features=st.dictionaries(
        NAMES, st.lists(st.lists(st.integers(-1, 5), max_size=3), max_size=2), max_size=2
    ),
    max_value=NUMBERS,
    max_interventions=st.integers(-1, 3),
    requests_per_minute=st.integers(-1, 10**6),
)
KEY_FILES = near(
    version=st.sampled_from([1, 0, 2]),
    keys=st.lists(
        near(
            id=st.sampled_from(["0123456789ab", "0123456789AB", "x"]),
            name=st.sampled_from(["a", "b", "", "a b"]),
            scopes=st.lists(st.sampled_from(["infer", "steer", "root"]), max_size=2),
            limits=_LIMITS,
            created=st.sampled_from(["2026-01-01T00:00:00Z", "2026-01-01", "never"]),
            expires=st.sampled_from(["2026-01-01T00:00:00Z", "9999-99-99T00:00:00Z"]),
            salt=st.sampled_from(["00" * 16, "0" * 31]),
            hash=st.sampled_from(["00" * 32, "zz" * 32]),
            n=st.sampled_from([2**14, 2**30, 3, 0]),
            r=st.integers(-1, 100),
            p=st.integers(-1, 20),
        ),
        max_size=2,
    ),
)
AUDIT_LINES = near(
    event=st.sampled_from(["request", "policy", "head", "start"]),
    time=st.sampled_from(["2026-01-01T00:00:00.000000Z", "2026-13-01T00:00:00.000000Z", "now"]),
    seq=st.integers(-1, 5),
    prev=st.sampled_from(["0" * 64, "f" * 64, "x"]),
    signature=st.text(max_size=4),
    key_id=st.text(max_size=4),
    request_id=st.text(max_size=4),
    status=st.integers(0, 700),
    policies=st.lists(near(name=st.just("a"), version=st.integers(), mode=st.just("enforce")), max_size=2),
    watched=st.dictionaries(st.text(max_size=3), near(tokens=st.integers(), above=NUMBERS), max_size=2),
    detail=st.text(max_size=8),
)
