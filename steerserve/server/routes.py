"""The routes that say what is served and what a request may ask for."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from fastapi import APIRouter, Query

from steerserve import __version__
from steerserve.catalog import Catalog, Source
from steerserve.sae import Direction, Sae
from steerserve.spec import MAX_JSON_CHARS, MAX_SELECTORS, Phase, Where

from .policy_routes import add_policy_routes
from .schema import (
    Capabilities,
    DirectionInfo,
    DirectionList,
    Health,
    LabelInfo,
    Limits,
    OpInfo,
    SaeInfo,
    SaeList,
)
from .state import SteeringState

__all__ = ["build_router"]

_ACTIVATION_UNITS = ["raw", "max"]
_OPS = [
    OpInfo(op="clamp", meaning="f' = value", needs_value=True, units=_ACTIVATION_UNITS),
    OpInfo(op="ablate", meaning="f' = 0", needs_value=False, units=["raw"]),
    OpInfo(op="scale", meaning="f' = value * f", needs_value=True, units=["raw"]),
    OpInfo(op="add", meaning="f' = f + value", needs_value=True, units=_ACTIVATION_UNITS),
    OpInfo(op="at_least", meaning="f' = max(f, value)", needs_value=True, units=_ACTIVATION_UNITS),
    OpInfo(op="at_most", meaning="f' = min(f, value)", needs_value=True, units=_ACTIVATION_UNITS),
]

Limit = Annotated[int, Query(ge=0, le=1000, description="labels of each SAE to show")]
Offset = Annotated[int, Query(ge=0, description="labels of each SAE to skip")]


def build_router(state: SteeringState) -> APIRouter:
    """The management routes, under /v1 so that the server's API key guards them."""
    router = APIRouter(prefix="/v1/steering", tags=["steering"])

    @router.get("/saes")
    def saes(limit: Limit = 100, offset: Offset = 0) -> SaeList:
        """The SAEs that are served, with a page of their features' labels."""
        return SaeList(data=[_sae(source, limit, offset) for source in _catalog_saes(state.catalog)])

    @router.get("/directions")
    def directions() -> DirectionList:
        """The named directions that are served."""
        found = state.catalog.directions if state.catalog else []
        return DirectionList(data=[_direction(source) for source in found])

    @router.get("/capabilities")
    def capabilities() -> Capabilities:
        """Ops, selectors and limits of this server, and the routes that carry `steering`."""
        return _capabilities(state)

    @router.get("/health")
    def health() -> Health:
        """Whether anything is served to steer with."""
        return _health(state)

    add_policy_routes(router, state)
    return router


def _health(state: SteeringState) -> Health:
    problems = {
        "policies": state.policies.problem if state.policies is not None else None,
        "keys": state.keys.problem if state.keys is not None else None,
        "audit": state.recorder.problem,
    }
    found = {name: problem for name, problem in problems.items() if problem is not None}
    head = None if state.recorder.log is None else str(state.recorder.log.head)
    if not (state.catalog and state.catalog.sources):
        return Health(status="not_configured", problems=found)
    status: Literal["ok", "degraded"] = "degraded" if found else "ok"
    return Health(status=status, problems=found, warnings=_warnings(state), audit_head=head)


def _warnings(state: SteeringState) -> dict[str, str]:
    if state.policies is None:
        return {}
    missing = state.names.missing_by_policy(state.policies.current().policies.values())
    return {name: f"nothing is called {', '.join(found)}" for name, found in missing.items()}


def _catalog_saes(catalog: Catalog | None) -> list[Source]:
    return catalog.saes if catalog else []


def _sae(source: Source, limit: int, offset: int) -> SaeInfo:
    sae = source.body
    assert isinstance(sae, Sae)
    labels = sae.manifest.labels if sae.manifest else []
    return SaeInfo(
        name=source.name,
        architecture=sae.architecture,
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        hook_point=source.point.name,
        layer=source.point.index - 1,
        statistics=sae.max_activation(0) is not None,
        resident=source.resident,
        files=dict(sae.manifest.files) if sae.manifest else {},
        labels=[
            LabelInfo(feature=label.feature, label=label.label, domain=label.domain, f1=label.f1)
            for label in labels[offset : offset + limit]
        ],
        labels_total=len(labels),
    )


def _direction(source: Source) -> DirectionInfo:
    direction = source.body
    assert isinstance(direction, Direction)
    return DirectionInfo(
        name=source.name,
        d_in=direction.vector.shape[0],
        hook_point=source.point.name,
        layer=source.point.index - 1,
    )


def _capabilities(state: SteeringState) -> Capabilities:
    catalog = state.catalog
    return Capabilities(
        steerserve=__version__,
        vllm=state.vllm_version,
        model=state.model,
        ops=_OPS,
        phases=list(get_args(Phase)),
        selectors=[*Where.model_fields],
        error_modes=["keep", "drop"] if catalog and catalog.residents else ["keep"],
        limits=Limits(
            interventions=catalog.max_interventions if catalog else 0,
            features_per_hook_point=catalog.rows_per_point if catalog else 0,
            selectors=MAX_SELECTORS,
            json_characters=MAX_JSON_CHARS,
        ),
        routes=list(state.routes) if catalog else [],
    )
