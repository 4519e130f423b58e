"""Every vLLM function that is wrapped, and the parameters relied on; checked before the first is touched."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from steerserve.config import parse_config
from steerserve.errors import IncompatibleError

__all__ = [
    "COHERE_SEAMS",
    "FRONT_END_SEAMS",
    "SEAMS",
    "V2_SEAMS",
    "Seam",
    "check",
    "refuse_configuration",
    "wrap",
]

TESTED_VERSIONS = ("0.32.0",)


@dataclass(frozen=True)
class Seam:
    """A wrapped function of vLLM's: its module, its dotted name there, the parameters in their order."""

    module: str
    name: str
    parameters: tuple[str, ...]

    def owner(self) -> Any:
        """The module or class that holds the function."""
        owner: Any = importlib.import_module(self.module)
        for part in self.name.split(".")[:-1]:
            owner = getattr(owner, part)
        return owner

    def problem(self) -> str | None:
        """Why this vLLM does not fit, or None if it does."""
        attribute = self.name.rsplit(".", 1)[-1]
        try:
            function = inspect.getattr_static(self.owner(), attribute)
        except (ImportError, AttributeError):
            return f"{self.module}.{self.name} does not exist"
        found = tuple(inspect.signature(inspect.unwrap(function)).parameters)
        if found[: len(self.parameters)] != self.parameters:
            return f"{self.module}.{self.name} takes {found}, expected it to begin with {self.parameters}"
        return None


_RUNNER = "vllm.v1.worker.gpu_model_runner"
_RUNNER_V2 = "vllm.v1.worker.gpu.model_runner"
_CACHE = "vllm.v1.core.kv_cache_utils"
_BLOCK = ("request", "start_token_idx", "end_token_idx", "start_mm_idx")

SEAMS = {
    "processor_init": Seam(
        "vllm.v1.engine.input_processor", "InputProcessor.__init__", ("self", "vllm_config", "renderer")
    ),
    "process_inputs": Seam(
        "vllm.v1.engine.input_processor",
        "InputProcessor.process_inputs",
        ("self", "request_id", "prompt", "params", "supported_tasks"),
    ),
    "block_keys": Seam(_CACHE, "generate_block_hash_extra_keys", _BLOCK),
    "block_keys_pool": Seam("vllm.v1.core.block_pool", "generate_block_hash_extra_keys", _BLOCK),
    "load_model": Seam(_RUNNER, "GPUModelRunner.load_model", ("self", "load_dummy_weights")),
    "load_model_cpu": Seam(
        "vllm.v1.worker.cpu_model_runner", "CPUModelRunner.load_model", ("self", "load_dummy_weights")
    ),
    "update_states": Seam(_RUNNER, "GPUModelRunner._update_states", ("self", "scheduler_output")),
    "model_forward": Seam(
        _RUNNER,
        "GPUModelRunner._model_forward",
        ("self", "input_ids", "positions", "intermediate_tensors", "inputs_embeds"),
    ),
    "worker_init": Seam("vllm.v1.worker.worker_base", "WorkerBase.__init__", ("self", "vllm_config")),
    "sample_tokens": Seam(_RUNNER, "GPUModelRunner.sample_tokens", ("self", "grammar_output")),
    "update_from_output": Seam(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
    ),
}

# Only a worker of the V2 runner has these; vLLM's CPU build must patch torch before they are imported.
V2_SEAMS = {
    "model_state_class": Seam(
        "vllm.v1.worker.gpu.model_states", "resolve_model_state_cls", ("vllm_config", "model")
    ),
    "finish_requests": Seam(_RUNNER_V2, "GPUModelRunner.finish_requests", ("self", "scheduler_output")),
    "sample_tokens_v2": Seam(_RUNNER_V2, "GPUModelRunner.sample_tokens", ("self", "grammar_output")),
    **{
        name: Seam("vllm.v1.worker.gpu.model_states.interface", f"ModelState.{name}", ("self", *parameters))
        for name, parameters in {
            "add_request": ("req_index", "new_req_data"),
            "preprocess_state": ("input_batch", "block_tables", "kv_cache_config", "num_computed_tokens"),
            "postprocess_state": ("idx_mapping", "num_sampled", "num_computed_tokens"),
            "prepare_inputs": ("input_batch", "req_states"),
            "prepare_dummy_inputs": ("num_reqs", "num_tokens"),
        }.items()
    },
}


_OFFLINE = "vllm.entrypoints.common.offline"

# Only the front end has these, and only it pays for importing them.
FRONT_END_SEAMS = {
    "add_request_async": Seam(
        "vllm.v1.engine.async_llm", "AsyncLLM.add_request", ("self", "request_id", "prompt", "params")
    ),
    "attach_endpoints": Seam(
        "vllm.entrypoints.launchers.app", "attach_endpoint_plugins", ("app", "supported_tasks")
    ),
    "run_batch_request": Seam(
        "vllm.entrypoints.launchers.run_batch", "run_request", ("serving_engine_func", "request", "tracker")
    ),
    "request_state": Seam(
        "vllm.v1.engine.output_processor",
        "RequestState.__init__",
        ("self", "request_id", "external_req_id", "parent_req"),
    ),
    "run_batch_line": Seam(
        "vllm.entrypoints.launchers.run_batch", "BatchRequestInput.model_validate_json", ("cls", "json_data")
    ),
    "offline_prompts": Seam(
        _OFFLINE,
        "OfflineInferenceMixin._preprocess_cmpl",
        ("self", "prompts", "tokenization_kwargs", "mm_processor_kwargs"),
    ),
    "offline_chats": Seam(
        _OFFLINE,
        "OfflineInferenceMixin._preprocess_chat",
        ("self", "conversations", "chat_template", "chat_template_content_format", "chat_template_kwargs"),
    ),
    "offline_beams": Seam(
        "vllm.entrypoints.generate.beam_search.offline",
        "BeamSearchOfflineMixin.beam_search",
        ("self", "prompts", "params"),
    ),
    "online_beams": Seam(
        "vllm.entrypoints.generate.beam_search.online",
        "BeamSearchOnlineMixin.beam_search",
        ("self", "prompt", "request_id", "params"),
    ),
    "completion_output": Seam(
        "vllm.v1.engine.output_processor",
        "RequestState._new_completion_output",
        ("self", "token_ids", "finish_reason", "stop_reason"),
    ),
    "chat_full_generator": Seam(
        "vllm.entrypoints.openai.chat_completion.serving",
        "OpenAIServingChat.chat_completion_full_generator",
        ("self", "request", "result_generator"),
    ),
    "responses_full_generator": Seam(
        "vllm.entrypoints.openai.responses.serving",
        "OpenAIServingResponses.responses_full_generator",
        ("self", "request", "sampling_params", "result_generator", "context"),
    ),
    "anthropic_stop_reason": Seam(
        "vllm.entrypoints.anthropic.serving",
        "_to_anthropic_stop_reason",
        ("finish_reason", "stop_reason", "tool_used", "tool_complete"),
    ),
}

# Only a front end with Cohere's library installed has these.
COHERE_SEAMS = {
    "cohere_finish_reason": Seam(
        "vllm.entrypoints.cohere.serving", "_map_finish_reason", ("reason", "stop_reason")
    ),
}


def check(seams: dict[str, Seam] = SEAMS) -> None:
    """Compare seams with this vLLM.

    Raises: IncompatibleError listing all that differ and the versions that were tested.
    """
    import vllm

    problems = [problem for seam in seams.values() if (problem := seam.problem())]
    if problems:
        tested = ", ".join(TESTED_VERSIONS)
        raise IncompatibleError(
            f"vLLM {vllm.__version__} differs from what steerserve wraps (tested: {tested});"
            f" nothing was patched. {'; '.join(problems)}"
        )


def refuse_configuration(error: IncompatibleError) -> None:
    """Make a vLLM that does not fit refuse every configuration that asks for steering, with this error."""
    from vllm.config import VllmConfig

    original = VllmConfig.__post_init__

    @functools.wraps(original)
    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        if parse_config(self.additional_config) is not None:
            raise error
        original(self, *args, **kwargs)

    VllmConfig.__post_init__ = post_init


def wrap(name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a seam's function by `make(original)`."""
    seam = (SEAMS | V2_SEAMS | FRONT_END_SEAMS | COHERE_SEAMS)[name]
    owner, attribute = seam.owner(), seam.name.rsplit(".", 1)[-1]
    original = getattr(owner, attribute)
    setattr(owner, attribute, functools.wraps(original)(make(original)))
