"""Engines are costly to start: one at a time, shared by every test that can use it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from steerserve.sae import Direction, Hook, write_direction
from tests.support.engine import Engine, start_engine
from tests.support.forking import fork_engines, interpret
from tests.support.models import D_MODEL, make_model
from tests.support.one import OneAtATime
from tests.support.saes import make_sae, make_trained

os.environ.setdefault("VLLM_PLUGINS", "steerserve")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

fork_engines()


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """SAEs of every architecture at several hook points, and a direction."""
    folder = tmp_path_factory.mktemp("assets")
    unit = torch.nn.functional.normalize(
        torch.randn(D_MODEL, generator=torch.Generator().manual_seed(5)), dim=0
    )
    write_direction(folder / "north.safetensors", Direction("north", unit, Hook(2, "resid_post")))
    return {
        "saes": {
            "std": (make_sae(folder / "std", "standard", 1, seed=1), 2),
            "jump": (make_sae(folder / "jump", "jumprelu", 2, seed=2), 3),
            "gate": (make_sae(folder / "gate", "gated", 2, seed=3), 3),
            "batch": (make_sae(folder / "batch", "batchtopk", 3, seed=4), 4),
            "first": (make_sae(folder / "first", "standard", 0, seed=6, site="resid_pre"), 0),
            "top": (make_sae(folder / "top", "topk", 1, seed=7, d_sae=4096, k=50), 2),
            "norm": (make_sae(folder / "norm", "jumprelu", 2, seed=8, normalize_activations="layer_norm"), 3),
            "switch": (make_trained(folder / "switch", "switch", 2, seed=9), 3),
            "kron": (make_trained(folder / "kron", "kron", 1, seed=10, d_sae=512), 2),
            "vaease": (make_trained(folder / "vaease", "vaease", 3, seed=11), 4),
        },
        "resident": {"kron", "norm", "switch", "top", "vaease"},
        "directions": {"north": (unit, 3)},
        "direction_files": {"north": folder / "north.safetensors"},
    }


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of the small models, made when first asked for."""
    folder = tmp_path_factory.mktemp("models")

    def model(family: str) -> Path:
        path = folder / family
        return path if path.exists() else make_model(path, family)

    return model


@pytest.fixture(scope="module")
def engine(
    request: pytest.FixtureRequest,
    running: OneAtATime,
    models: Callable[[str], Path],
    assets: dict[str, Any],
) -> Engine:
    """An engine with everything served; parametrised indirectly by {"family": …, further LLM arguments}.

    `runner: "v2"` asks for vLLM's V2 model runner, whose kernels Triton's interpreter runs on the CPU. Files
    that ask for the same share it.
    """
    asked: dict[str, Any] = getattr(request, "param", {"family": "llama"})

    @contextmanager
    def start() -> Iterator[Engine]:
        options = dict(asked)
        with pytest.MonkeyPatch.context() as patch:
            if options.keys() & {"tensor_parallel_size", "pipeline_parallel_size"}:
                patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
            if options.pop("runner", "v1") == "v2":
                interpret(patch)
            started = start_engine(models(options.pop("family")), assets, **options)
            yield started
            started.stop()

    return running.get(repr(sorted(asked.items())), start)
