"""What is served: names → SAEs and directions at their hook points, with everything a plan needs to know."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from .config import DirectionConfig, SaeConfig, SteerserveConfig
from .errors import CheckpointError, ConfigError, RequestError
from .hookpoint import HookPoint
from .sae import Direction, FeatureRows, Hook, Sae, open_sae, read_direction
from .sae.content import content_digest

__all__ = ["Catalog", "Source", "build_catalog", "check_served"]

DIRECTION_PREFIX = "direction:"
SAE_PREFIX = "sae:"
# What policies may read at one hook point; a request's own rows have their places beside these.
POLICY_ROWS = 64


@dataclass(frozen=True)
class Source:
    """One SAE or direction that is served.

    `key` is unique over both kinds ("sae:demo", "direction:french"); `identify` gives what identifies the
    weights, or is it; `resident` says that the workers hold the whole SAE on their device.
    """

    key: str
    name: str
    point: HookPoint
    n_features: int
    identify: str | Callable[[], str] = field(repr=False)
    body: Sae | Direction = field(repr=False)
    labels: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    resident: bool = False

    @property
    def is_sae(self) -> bool:
        """Whether this is an SAE rather than a direction."""
        return self.key.startswith(SAE_PREFIX)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the weights by their content: equal in all replicas. Reads their files when first asked.

        Raises: CheckpointError if they cannot be read.
        """
        return self.identify if isinstance(self.identify, str) else self.identify()

    @property
    def sha256(self) -> str | None:
        """Of the weights, which was checked when they were opened; None where no manifest records it."""
        if not isinstance(self.body, Sae) or self.body.manifest is None:
            return None
        return self.body.manifest.files.get(self.body.path.name)

    def rows(self, features: Sequence[int]) -> FeatureRows:
        """The serving form of the named features."""
        return self.body.rows(features) if isinstance(self.body, Sae) else self.body.rows()

    def check_rows(self, features: Sequence[int], at: Sequence[str | int]) -> None:
        """Read rows of an SAE too large to check at start-up; the worker then finds them in the page cache.

        Raises: RequestError if they cannot be read, or a weight is not finite.
        """
        if not isinstance(self.body, Sae) or self.body.reader is None:
            return
        try:
            self.body.rows(features)
        except CheckpointError as error:
            message = f"expected sound weights of these features of `{self.name}`: {error}"
            raise RequestError(message, at=at, reason="damaged") from error

    def max_activation(self, feature: int) -> float | None:
        """The feature's recorded maximum activation, raw units; None where there are no statistics."""
        if isinstance(self.body, Sae):
            return self.body.max_activation(feature)
        return self.body.statistics.get("max_activation")

    def feature(self, ref: int | str, at: Sequence[str | int]) -> int:
        """The index that an index or a label means.

        Raises: RequestError if it is out of range, unknown or ambiguous.
        """
        if isinstance(ref, int):
            if ref < self.n_features:
                return ref
            raise RequestError(
                f"expected `feature` < {self.n_features}, got {ref}", at=at, reason="out_of_range"
            )
        found = self.labels.get(ref, ())
        if len(found) == 1:
            return found[0]
        if found:
            message = f"expected a label of exactly one feature, got {ref!r} of features {list(found)[:8]}"
        else:
            message = f"expected a feature label of SAE `{self.name}`, got {ref!r}{_hint(ref, self.labels)}"
        raise RequestError(message, at=at, reason="unknown_feature")


@dataclass(frozen=True, eq=False)
class Catalog:
    """Everything that is served, for one model.

    `special_tokens` are the token ids that steering leaves alone unless asked. `policy_rows` is how many
    features policies may read at one hook point beside a request's own; `stages` how many pipeline stages
    share the layers.
    """

    sources: dict[str, Source]
    n_layers: int
    d_model: int
    special_tokens: frozenset[int]
    max_interventions: int
    policy_rows: int = 0
    stages: int = 1

    @property
    def saes(self) -> list[Source]:
        """The SAEs, in the order of the configuration."""
        return [source for source in self.sources.values() if source.is_sae]

    @property
    def directions(self) -> list[Source]:
        """The directions, in the order of the configuration."""
        return [source for source in self.sources.values() if not source.is_sae]

    @cached_property
    def reads_disk(self) -> bool:
        """Whether a plan may need rows that were not read at the start."""
        return any(isinstance(one.body, Sae) and one.body.reader is not None for one in self.sources.values())

    @cached_property
    def residents(self) -> list[Source]:
        """The SAEs that workers hold whole; an index into this list names one of them."""
        return [source for source in self.sources.values() if source.resident]

    def identify(self) -> None:
        """Read, once, what tells the weights of all sources from others: for a start, not for a request.

        Raises: CheckpointError if some cannot be read.
        """
        for source in self.sources.values():
            _ = source.fingerprint

    def resident_of(self, key: str) -> int:
        """Which resident gives this source's activations; −1 where a feature's own row suffices."""
        source = self.sources[key]
        needed = isinstance(source.body, Sae) and source.body.needs_resident is not None
        return self.residents.index(source) if needed else -1

    @property
    def points(self) -> list[HookPoint]:
        """The hook points in use, in the order in which the stream passes them."""
        return sorted({source.point for source in self.sources.values()})

    @property
    def features_per_request(self) -> int:
        """The most features one request may read at one hook point: interventions and as many conditions."""
        return 2 * self.max_interventions

    @property
    def rows_per_point(self) -> int:
        """The most features one plan may read at one hook point, policies included."""
        return self.features_per_request + self.policy_rows

    def sae(self, name: str | None, at: Sequence[str | int]) -> Source:
        """The SAE of that name; the only one where no name is given.

        Raises: RequestError if there is none, or several to choose from.
        """
        names = [source.name for source in self.saes]
        if name is None:
            if len(names) == 1:
                return self.saes[0]
            if not names:
                raise RequestError(
                    "expected no `feature`: no SAE is served here", at=at, reason="unknown_sae"
                )
            raise RequestError(f"expected `sae`, one of {names}", at=(*at, "sae"), reason="unknown_sae")
        if SAE_PREFIX + name not in self.sources:
            message = f"expected `sae` to be one of {names}, got {name!r}{_hint(name, names)}"
            raise RequestError(message, at=(*at, "sae"), reason="unknown_sae")
        return self.sources[SAE_PREFIX + name]

    def direction(self, name: str, at: Sequence[str | int]) -> Source:
        """The direction of that name.

        Raises: RequestError if there is none.
        """
        if DIRECTION_PREFIX + name not in self.sources:
            names = [source.name for source in self.directions]
            message = f"expected `direction` to be one of {names}, got {name!r}{_hint(name, names)}"
            raise RequestError(message, at=(*at, "direction"), reason="unknown_direction")
        return self.sources[DIRECTION_PREFIX + name]


def build_catalog(
    config: SteerserveConfig,
    *,
    n_layers: int,
    d_model: int,
    special_tokens: Iterable[int] = (),
    stages: int = 1,
) -> Catalog:
    """Open every SAE and direction of the configuration and check it against the model's shape.

    Args:
        n_layers: decoder layers of the model.
        d_model: width of its residual stream.
        special_tokens: ids that steering leaves alone by default.
        stages: pipeline stages of the engine.
    Raises: ConfigError or CheckpointError naming the entry that cannot be served.
    """
    sources: dict[str, Source] = {}
    for entry in config.saes:
        sae = open_sae(entry.path)
        check_served(entry.name, sae, resident=entry.resident)
        _check_width(f"SAE `{entry.name}`", sae.d_in, d_model, entry.path)
        point = _point(f"SAE `{entry.name}`", entry, sae.hook, n_layers)
        labels = _labels(sae)
        source = Source(
            SAE_PREFIX + entry.name,
            entry.name,
            point,
            sae.d_sae,
            partial(content_digest, entry.path),
            sae,
            labels,
            entry.resident,
        )
        sources[source.key] = source
    for named in config.directions:
        direction = read_direction(named.path, named.name)
        _check_width(f"direction `{named.name}`", direction.vector.shape[0], d_model, named.path)
        point = _point(f"direction `{named.name}`", named, direction.hook, n_layers)
        source = Source(
            DIRECTION_PREFIX + named.name,
            named.name,
            point,
            1,
            partial(content_digest, named.path),
            direction,
        )
        sources[source.key] = source
    policy_rows = POLICY_ROWS if config.policies is not None else 0
    special = frozenset(special_tokens)
    return Catalog(sources, n_layers, d_model, special, config.max_interventions, policy_rows, stages)


def check_served(name: str, sae: Sae, *, resident: bool) -> None:
    """Refuse an SAE that cannot be served exactly as it is configured.

    Raises: CheckpointError if it cannot be served at all, ConfigError if only with `resident: true`.
    """
    if sae.refusal is not None:
        raise CheckpointError(f"SAE `{name}` cannot be served exactly: {sae.refusal}", path=sae.path)
    if sae.needs_resident is not None and not resident:
        raise ConfigError(
            f"SAE `{name}`: expected `resident: true` (--resident {name}): {sae.needs_resident}"
        )


def _check_width(what: str, got: int, d_model: int, path: Path) -> None:
    if got != d_model:
        raise CheckpointError(f"{what}: expected width {d_model}, the model's, got {got}", path=path)


def _point(what: str, entry: SaeConfig | DirectionConfig, recorded: Hook | None, n_layers: int) -> HookPoint:
    layer = entry.layer if entry.layer is not None or recorded is None else recorded.layer
    site = entry.hook or (recorded.site if recorded is not None else "resid_post")
    if layer is None:
        raise ConfigError(f"{what}: expected `layer`, which its own config does not say")
    return HookPoint.of(layer, site, n_layers)


def _labels(sae: Sae) -> dict[str, tuple[int, ...]]:
    found: dict[str, list[int]] = {}
    for label in sae.manifest.labels if sae.manifest else ():
        found.setdefault(label.label, []).append(label.feature)
    return {label: tuple(features) for label, features in found.items()}


def _hint(got: str, known: Iterable[str]) -> str:
    # Bounded: this runs on the server's event loop.
    close = difflib.get_close_matches(got, list(itertools.islice(known, 1000)), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
