"""What in vLLM's models could split or defer the residual stream between ranks, found in their source.

`python -m tests.support.model_audit FOLDER` lists it for the vLLM in a folder (see `vllm_sources.Sources`).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from .vllm_sources import Definition, Sources

__all__ = ["ARCHITECTURES", "architectures", "flagged", "flags"]

_REGISTRY = "vllm.model_executor.models.registry"
_MODELS = "vllm.model_executor.models"
# The tables of what generates; draft models, embedders and classifiers are refused by what they are.
ARCHITECTURES = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_BACKEND_MODELS")
_WITHIN = ("vllm.models.", f"{_MODELS}.")
_SPLITS = ("sequence_parallel", "reduce_scatter", "sp_shard", "sp_all_gather")


def architectures(sources: Sources) -> dict[str, list[Definition]]:
    """Every architecture that generates, and the class or classes (by platform) that serve it."""
    found: dict[str, list[Definition]] = {}
    for table in ARCHITECTURES:
        for name, (module, cls) in sources.mapping(_REGISTRY, table).items():
            place = module if module.startswith("vllm.") else f"{_MODELS}.{module}"
            found[name] = list(sources.find(place, cls))
    return found


def flagged(sources: Sources) -> dict[str, tuple[set[str], set[str]]]:
    """What is flagged, by its path: why, and the architectures that reach it."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    known: dict[Definition, set[str]] = {}
    for architecture, classes in architectures(sources).items():
        for definition in sources.reached(classes, _WITHIN):
            if definition not in known:
                known[definition] = set(flags(definition))
            if known[definition]:
                whys, reaching = found.setdefault(definition.path, (set(), set()))
                whys |= known[definition]
                reaching.add(architecture)
    return found


def flags(definition: Definition) -> Iterator[str]:
    """Why a definition is suspect, if it is."""
    names = {name.lower() for name in definition.names}
    if "MoEOutput" in definition.names or any("reduce" in n and "norm" in n for n in names):
        yield "a deferred all-reduce"
    if any(_leaves_partial(node) for node in ast.walk(definition.node)) and not _is_experts(definition):
        yield "reduce_results=False"
    if _is_of_the_stream(definition) and any(part in n for n in names for part in _SPLITS):
        yield "sequence parallelism"
    if "kv_sharing_fast_prefill" in names:
        yield "fast prefill"


def _leaves_partial(node: ast.AST) -> bool:
    """`reduce_results=` anything but True, or what the caller says: then it is the caller that is asked."""
    if not isinstance(node, ast.keyword) or node.arg != "reduce_results":
        return False
    value = node.value
    passed_on = isinstance(value, ast.Name) and value.id == "reduce_results"
    return not passed_on and not (isinstance(value, ast.Constant) and value.value is True)


def _is_experts(definition: Definition) -> bool:
    """A block of experts: its shared expert is left unreduced to be reduced with the routed ones, inside."""
    return any(part in definition.name.lower() for part in ("moe", "expert"))


def _is_of_the_stream(definition: Definition) -> bool:
    """A decoder layer, a whole model, or a function: what lies inside of a layer gathers what it splits."""
    return isinstance(definition.node, ast.FunctionDef) or any(
        part in definition.name for part in ("Layer", "Model", "Decoder")
    )


def main() -> None:
    """Print what is flagged in the vLLM of a folder."""
    for path, (whys, reaching) in sorted(flagged(Sources(Path(sys.argv[1]))).items()):
        print(f"{path}: {', '.join(sorted(whys))} ({', '.join(sorted(reaching))})")


if __name__ == "__main__":
    main()
