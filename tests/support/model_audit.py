"""What in vLLM's models could split or defer the residual stream between ranks, found in their source.

`python -m tests.support.model_audit FOLDER` lists it for the vLLM in a folder (see `vllm_sources.Sources`).
"""

from __future__ import annotations

import ast
import gc
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

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


def flagged(root: Path) -> dict[str, tuple[set[str], set[str]]]:
    """What is flagged, by its path: why, and the architectures that reach it.

    Args: root: the folder that holds `vllm/`.
    """
    # Millions of nodes, none of which is garbage.
    gc.disable()
    try:
        return _flagged(Sources(root, _WITHIN))
    finally:
        gc.enable()


def _flagged(sources: Sources) -> dict[str, tuple[set[str], set[str]]]:
    every = architectures(sources)
    edges = sources.edges(d for classes in every.values() for d in classes)
    for definition, named in edges.items():
        # One architecture may build another by its name.
        named.update(d for text in definition.strings & every.keys() for d in every[text])
    whys = {definition: why for definition in edges if (why := set(flags(definition)))}
    found: dict[str, tuple[set[str], set[str]]] = {d.path: (why, set()) for d, why in whys.items()}
    for architecture, classes in every.items():
        for definition in _reached(classes, edges) & whys.keys():
            found[definition.path][1].add(architecture)
    return found


def _reached(start: Iterable[Definition], edges: Mapping[Definition, set[Definition]]) -> set[Definition]:
    seen, todo = set(start), list(start)
    while todo:
        new = edges[todo.pop()] - seen
        seen |= new
        todo += new
    return seen


def flags(definition: Definition) -> Iterator[str]:
    """Why a definition is suspect, if it is."""
    names = {name.lower() for name in definition.names}
    if "MoEOutput" in definition.names or any("reduce" in n and "norm" in n for n in names):
        yield "a deferred all-reduce"
    if any(map(_leaves_partial, definition.nodes)) and not _is_experts(definition):
        yield "reduce_results=False"
    if _is_of_the_stream(definition) and any(part in n for n in names for part in _SPLITS):
        yield "sequence parallelism"
    if "kv_sharing_fast_prefill" in names:
        yield "fast prefill"


def _leaves_partial(node: Any) -> bool:
    """`reduce_results=` anything but True, or what the caller says: then it is the caller that is asked."""
    if isinstance(node, ast.keyword):
        said = node.arg == "reduce_results"
    else:
        said = isinstance(node, ast.Assign) and getattr(node.targets[0], "attr", "") == "reduce_results"
    if not said:
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
    for path, (whys, reaching) in sorted(flagged(Path(sys.argv[1])).items()):
        print(f"{path}: {', '.join(sorted(whys))} ({', '.join(sorted(reaching))})")


if __name__ == "__main__":
    main()
