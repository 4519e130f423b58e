"""Builds vLLM's own model of each family (random weights, one process) and hooks it; prints what came of it.

Run as `python -m tests.support.families FOLDER`: in its own process, as vLLM's parallel state is global.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

N_LAYERS, WIDTH = 3, 64
_SIZES = {
    "vocab_size": 128,
    "hidden_size": WIDTH,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
}
_HEADS = {"head_dim": 32}


def _quantised(how: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    return "LlamaConfig", "LlamaForCausalLM", _SIZES | {"quantization_config": how}


FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _SIZES),
    "mistral": ("MistralConfig", "MistralForCausalLM", _SIZES | _HEADS),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _SIZES),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _SIZES | _HEADS),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _SIZES | _HEADS),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _SIZES | _HEADS),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": 128, "n_embd": WIDTH, "n_layer": N_LAYERS, "n_head": 2, "n_positions": 128},
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _SIZES),
    "phi": ("PhiConfig", "PhiForCausalLM", _SIZES),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _SIZES | {"pad_token_id": 0}),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", _SIZES),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _SIZES),
    "cohere": ("CohereConfig", "CohereForCausalLM", _SIZES),
    # Their parameters are float8, and int32.
    "llama, fp8": _quantised({"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "llama, awq": _quantised({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}),
}


def main() -> None:
    """Print {family: hooked points, or the error's text}."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs

    folder = Path(sys.argv[1])
    results: dict[str, Any] = {}
    with tempfile.NamedTemporaryFile() as rendezvous:
        for family in FAMILIES:
            path = _write(folder, family)
            # No method of quantisation goes with float32.
            dtype = "bfloat16" if "quantization_config" in FAMILIES[family][2] else "float32"
            config = EngineArgs(
                model=str(path), skip_tokenizer_init=True, enforce_eager=True, dtype=dtype
            ).create_engine_config()
            with set_current_vllm_config(config):
                init_distributed_environment(1, 0, f"file://{rendezvous.name}", 0, "gloo")
                ensure_model_parallel_initialized(1, 1)
                results[family] = _hook(config)
    print(json.dumps(results))


def _write(folder: Path, family: str) -> Path:
    config_class, architecture, sizes = FAMILIES[family]
    config = getattr(transformers, config_class)(**sizes, architectures=[architecture])
    config.save_pretrained(folder / family)
    return folder / family


def _hook(config: Any) -> Any:
    from vllm.model_executor.model_loader.utils import initialize_model

    from steerserve.errors import IncompatibleError
    from steerserve_vllm.layers import find_layers, hook_points

    with torch.device("cpu"):
        model = initialize_model(config)
    for parameter in model.parameters():
        if parameter.dtype is config.model_config.dtype:
            torch.nn.init.uniform_(parameter, -0.1, 0.1)
    names = [name for name, _ in model.named_parameters()]
    try:
        layers, dtype = find_layers(model, N_LAYERS), config.model_config.dtype
        points = hook_points(layers, range(N_LAYERS + 1), WIDTH, dtype=dtype, device="cpu")
    except IncompatibleError as error:
        return str(error)
    assert names == [name for name, _ in model.named_parameters()]
    return points


if __name__ == "__main__":
    main()
