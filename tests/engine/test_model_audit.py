"""Every architecture of vLLM's whose ranks may not all see the same stream is refused, or known not to do so.

A new version of vLLM is asked by its sources first: see `test_compat`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import vllm

from steerserve_vllm.compat import TENSOR_PARALLEL_MODELS
from tests.support.model_audit import architectures, flagged
from tests.support.vllm_sources import Sources

INSTALLED = Path(vllm.__file__).parents[1]
OTHER = [Path(folder) for folder in os.environ.get("STEERSERVE_VLLM_SOURCES", "").split(os.pathsep) if folder]

_IN_THE_LAYER = "attention and MLP run side by side, and the layer reduces their sum before it returns"
_EXPERTS = "only under `use_sequence_parallel_moe`, which is refused"
_FAST_PREFILL = "only under `kv_sharing_fast_prefill`, which is refused"
_INSIDE = "what it splits it gathers again, inside of the layer"
# What is flagged and yet served with several ranks, with the reason. By the place of the definition, so that
# a new model which uses it the same way is covered, and one that brings its own is not.
SERVED = {
    "model_executor.models.alice_ai:AliceAIDecoderBlock": "it refuses `use_sequence_parallel_moe` itself",
    "model_executor.models.commandr:CohereAttention": _IN_THE_LAYER,
    "model_executor.models.deepseek_v2:DeepseekV2DecoderLayer": _EXPERTS,
    "model_executor.models.deepseek_v2:DeepseekV2Model": _EXPERTS,
    "model_executor.models.falcon:FalconAttention": _IN_THE_LAYER,
    "model_executor.models.falcon:FalconMLP": _IN_THE_LAYER,
    "model_executor.models.gemma3n:Gemma3nCrossDecoder": _FAST_PREFILL,
    "model_executor.models.gemma3n:Gemma3nSelfDecoder": _FAST_PREFILL,
    "model_executor.models.gemma3n:Gemma3nTextModel": _FAST_PREFILL,
    "model_executor.models.gemma4:Gemma4CrossDecoderLayers": _FAST_PREFILL,
    "model_executor.models.gemma4:Gemma4Model": _FAST_PREFILL,
    "model_executor.models.gemma4:Gemma4SelfDecoderLayers": _FAST_PREFILL,
    "model_executor.models.granitemoe:GraniteMoeDecoderLayer": _EXPERTS,
    "model_executor.models.interns2_mobius:InternS2MobiusDecoderLayer": _EXPERTS,
    "model_executor.models.interns2_mobius:InternS2MobiusModel": _EXPERTS,
    "model_executor.models.qwen3_5:Qwen3_5DecoderLayer": _EXPERTS,
    "model_executor.models.qwen3_next:Qwen3NextDecoderLayer": _EXPERTS,
    "model_executor.models.qwen3_next:Qwen3NextModel": _EXPERTS,
    "model_executor.models.qwen3_next:_should_replicate_misaligned_shared_expert": _EXPERTS,
    "model_executor.models.qwen3_next:_should_use_sequence_parallel": _EXPERTS,
    "model_executor.models.transformers.fusers.moe:_moe_block_forward": _INSIDE,
    "model_executor.models.transformers.moe:_hf_topk_router_precomputed": _INSIDE,
    "model_executor.models.utils:sequence_parallel_chunk": _EXPERTS,
}


@pytest.fixture(scope="module", params=[INSTALLED, *OTHER], ids=["installed", *map(str, OTHER)])
def sources(request: pytest.FixtureRequest) -> Sources:
    return Sources(request.param)


@pytest.fixture(scope="module")
def found(sources: Sources) -> dict[str, tuple[set[str], set[str]]]:
    return flagged(sources.root)


def test_every_architecture_is_read(sources: Sources) -> None:
    every = architectures(sources)
    assert len(every) > 200
    assert [name for name, classes in every.items() if not classes] == []


def test_what_may_split_or_defer_the_stream_is_refused_or_explained(
    found: dict[str, tuple[set[str], set[str]]],
) -> None:
    unexplained = {
        f"{path}: {', '.join(sorted(whys))}": refused
        for path, (whys, reaching) in found.items()
        if path not in SERVED and (refused := sorted(reaching - TENSOR_PARALLEL_MODELS.keys()))
    }
    assert unexplained == {}


def test_what_is_known_to_defer_the_all_reduce_is_found(
    found: dict[str, tuple[set[str], set[str]]],
) -> None:
    whys, reaching = found["models.deepseek_v32.nvidia.model:DeepseekV32DecoderLayer"]
    assert whys == {"a deferred all-reduce", "reduce_results=False", "sequence parallelism"}
    assert {"DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"} <= reaching
    assert (
        "MiniMaxM3SparseForConditionalGeneration" in found["models.minimax_m3.nvidia.model:MiniMaxM3Model"][1]
    )
    assert "KimiVLForConditionalGeneration" in found["model_executor.models.deepseek_v2:DeepseekV2Model"][1]


def test_a_new_model_that_defers_the_all_reduce_is_seen(tmp_path: Path) -> None:
    """A registry of one plain model, one that defers, and one that only builds that by its name."""
    models = tmp_path / "vllm" / "model_executor" / "models"
    models.mkdir(parents=True)
    (models / "registry.py").write_text(
        "_TEXT_GENERATION_MODELS = {'Plain': ('plain', 'Plain'), 'Late': ('late', 'Late')}\n"
        "_MULTIMODAL_MODELS = {'Seeing': ('late', 'Seeing')}\n"
        "_TRANSFORMERS_BACKEND_MODELS = {}\n"
    )
    layer = "class {0}Layer:\n    def __init__(self):\n        self.mlp = MLP(reduce_results={1})\n"
    late = layer.format("Late", False) + "class Late:\n    make = LateLayer\n"
    (models / "plain.py").write_text(layer.format("Plain", True) + "class Plain:\n    make = PlainLayer\n")
    (models / "late.py").write_text(late + "class Seeing:\n    text = build('Late')\n")
    assert flagged(tmp_path) == {
        "model_executor.models.late:LateLayer": ({"reduce_results=False"}, {"Late", "Seeing"})
    }
