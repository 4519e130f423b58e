"""How long admission takes under many policies: parsing, compiling, merging, and the trip to the engine."""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path
from statistics import quantiles
from typing import Any

import msgspec

from steerserve.catalog import Catalog, build_catalog
from steerserve.compile import compile_plan
from steerserve.config import SaeConfig, SteerserveConfig
from steerserve.policy.enforcement import Caller, Enforcement
from steerserve.spec import parse_spec_json

from .shapes import write_sae

__all__ = ["admission", "write_policies"]

_LAYERS, _WIDTH, _FEATURES = 4, 896, 4096
# A route's own model and key, as every request of one application has them.
_CALLER = Caller(("model",), "/v1/chat/completions", frozenset({"infer", "steer"}), "application")


def write_policies(folder: Path, count: int, sae: str, *, mode: str = "enforce") -> None:
    """`count` policies of one ablated feature each, the first features of the SAE."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        document = {
            "name": f"policy{number:02d}",
            "version": 1,
            "mode": mode,
            "owner": "benchmark",
            "reason": "measured",
            "interventions": [
                {"sae": sae, "feature": number, "op": "ablate", "where": {"special_tokens": True}}
            ],
        }
        # JSON is YAML.
        (folder / f"policy{number:02d}.yaml").write_text(json.dumps(document), encoding="utf-8")


def admission(policies: int, interventions: int, samples: int) -> dict[str, Any]:
    """Microseconds of admitting requests that no request before was equal to, and of ones that are known.

    Args: interventions: of each request; none of them touches what a policy holds.
    """
    with tempfile.TemporaryDirectory(prefix="steerserve-bench-") as made:
        folder = Path(made)
        sae = SaeConfig(name="bench", path=write_sae(folder / "sae", _WIDTH, _FEATURES, 2))
        config = SteerserveConfig(saes=[sae], policies=folder / "policies")
        catalog = build_catalog(config, n_layers=_LAYERS, d_model=_WIDTH)
        write_policies(folder / "policies", policies, "bench")
        enforcement = Enforcement(folder / "policies", catalog)
        rng = random.Random(0)
        texts = [_request(rng, policies, interventions) for _ in range(samples)]
        _timed(texts[:50], catalog, enforcement)
        return {
            "policies": policies,
            "interventions": interventions,
            "samples": samples,
            "new": _timed(texts[50:], catalog, enforcement),
            "unsteered": _timed([None] * samples, catalog, enforcement),
        }


def _timed(texts: list[str] | list[None], catalog: Catalog, enforcement: Enforcement) -> dict[str, float]:
    spent = []
    for text in texts:
        started = time.perf_counter()
        own = None if text is None else compile_plan(parse_spec_json(text), catalog)
        merged = enforcement.current().merge(own, _CALLER)
        assert merged.plan is not None
        msgspec.msgpack.encode(merged.plan.wire)
        spent.append((time.perf_counter() - started) * 1e6)
    cuts = quantiles(spent, n=100, method="inclusive")
    return {"p50": round(cuts[49], 1), "p99": round(cuts[98], 1), "max": round(max(spent), 1)}


def _request(rng: random.Random, held: int, interventions: int) -> str:
    features = rng.sample(range(held, _FEATURES), interventions)
    entries = [
        {"sae": "bench", "feature": feature, "op": "clamp", "value": round(rng.uniform(1, 9), 3)}
        for feature in features
    ]
    return json.dumps({"interventions": entries})
