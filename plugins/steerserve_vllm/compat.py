"""What vLLM must offer, by version: functions that are wrapped, attributes and settings that are read.

Nothing else of steerserve says what vLLM looks like. Tests compare every line with the vLLM that is installed
and, for another version, with its unpacked sources. A new version is added here: where it differs, and which
of its models would leave the residual stream split or unreduced between ranks.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "ATTRIBUTES",
    "COHERE_SEAMS",
    "FRONT_END_SEAMS",
    "ONLY",
    "SEAMS",
    "SETTINGS",
    "TENSOR_PARALLEL_MODELS",
    "V2_SEAMS",
    "VERSIONS",
    "Seam",
    "series",
]

# Release series, and what was done with it.
VERSIONS = {"0.32": "0.32.0 tested", "0.33": "0.33.0 compared by its sources"}


def series(version: str) -> str:
    """`0.32` of `0.32.1+cpu`."""
    return ".".join(version.split(".")[:2])


@dataclass(frozen=True)
class Seam:
    """A function of vLLM's that is wrapped or called.

    Args:
        module: where it is.
        name: its dotted name there.
        parameters: the first ones, in their order.
        further: by release series, those that follow only there.
        keywords: those that are given by name, wherever they stand.
    """

    module: str
    name: str
    parameters: tuple[str, ...]
    further: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    keywords: tuple[str, ...] = ()

    def owner(self) -> Any:
        """The module or class that holds the function."""
        owner: Any = importlib.import_module(self.module)
        for part in self.name.split(".")[:-1]:
            owner = getattr(owner, part)
        return owner

    def expected(self, version: str) -> tuple[str, ...]:
        """The parameters with which it begins in this version of vLLM."""
        return self.parameters + self.further.get(series(version), ())

    def problem(self) -> str | None:
        """Why the vLLM that is installed does not fit, or None if it does."""
        import vllm

        attribute = self.name.rsplit(".", 1)[-1]
        try:
            function = inspect.getattr_static(self.owner(), attribute)
        except (ImportError, AttributeError):
            return f"{self.module}.{self.name} does not exist"
        # What is wrapped already was taken from its class bound, if it is a class's method.
        function = inspect.unwrap(function)
        found = tuple(inspect.signature(getattr(function, "__func__", function)).parameters)
        expected = self.expected(vllm.__version__)
        if found[: len(expected)] != expected:
            return f"{self.module}.{self.name} takes {found}, expected it to begin with {expected}"
        if missing := [name for name in self.keywords if name not in found]:
            return f"{self.module}.{self.name} takes {found}, expected {missing} too"
        return None


_OFFLINE = "vllm.entrypoints.common.offline"
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
        ("self", "request_id", "prompt", "params", "supported_tasks", "arrival_time", "lora_request"),
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
    "dummy_run": Seam(
        _RUNNER,
        "GPUModelRunner._dummy_run",
        ("self", "num_tokens"),
        keywords=("is_profile", "skip_eplb"),
    ),
    "compile_key": Seam("vllm.config.vllm", "VllmConfig.compute_hash", ("self", "include_version")),
}

# Only a worker of the V2 runner has these; vLLM's CPU build must patch torch before they are imported.
V2_SEAMS = {
    "model_state_class": Seam(
        "vllm.v1.worker.gpu.model_states", "resolve_model_state_cls", ("vllm_config", "model")
    ),
    "finish_requests": Seam(_RUNNER_V2, "GPUModelRunner.finish_requests", ("self", "scheduler_output")),
    "dummy_run_v2": Seam(
        _RUNNER_V2,
        "GPUModelRunner._dummy_run",
        ("self", "num_tokens"),
        keywords=("is_profile", "skip_attn", "skip_eplb"),
    ),
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

# Only the front end has these, and only it pays for importing them.
FRONT_END_SEAMS = {
    "add_request_async": Seam(
        "vllm.v1.engine.async_llm", "AsyncLLM.add_request", ("self", "request_id", "prompt", "params")
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
    "attach_endpoints": Seam(
        "vllm.entrypoints.launchers.app", "attach_endpoint_plugins", ("app", "supported_tasks")
    ),
    "run_batch_request": Seam(
        "vllm.entrypoints.launchers.run_batch",
        "run_request",
        ("serving_engine_func", "request"),
        # From 0.33 on, who calls it counts what is done.
        further={"0.32": ("tracker",)},
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

# What is read of vLLM's configuration, by the class that has it. Every refusal reads one of these, as it is:
# a setting that a version renames is an error at start-up there, never a refusal that is gone.
SETTINGS: dict[str, tuple[str, ...]] = {
    "vllm.config.vllm:VllmConfig": (
        "additional_config",
        "cache_config",
        "compilation_config",
        "compute_hash",
        "device_config",
        "kv_transfer_config",
        "model_config",
        "offload_config",
        "parallel_config",
        "scheduler_config",
        "speculative_config",
        "use_v2_model_runner",
    ),
    "vllm.config.model:ModelConfig": (
        "architecture",
        "architectures",
        "dtype",
        "enable_sleep_mode",
        "enforce_eager",
        "get_hidden_size",
        "get_total_num_hidden_layers",
        "get_vocab_size",
        "hf_config",
        "is_encoder_decoder",
        "max_model_len",
        "model",
        "original_max_model_len",
        "runner_type",
        "served_model_name",
        "skip_tokenizer_init",
    ),
    "vllm.config.parallel:ParallelConfig": (
        "_api_process_count",
        "_api_process_rank",
        "data_parallel_rank",
        "data_parallel_size",
        "decode_context_parallel_size",
        "enable_hc_sp",
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
        "rank",
        "tensor_parallel_size",
        "use_sequence_parallel_moe",
        "use_ubatching",
    ),
    "vllm.config.cache:CacheConfig": ("kv_sharing_fast_prefill",),
    "vllm.config.compilation:CompilationConfig": ("cudagraph_capture_sizes", "cudagraph_mode"),
    "vllm.config.device:DeviceConfig": ("device_type",),
    "vllm.config.offload:OffloadConfig": ("offload_backend", "prefetch"),
    "vllm.config.offload:PrefetchOffloadConfig": ("offload_group_size",),
    "vllm.config.scheduler:SchedulerConfig": (
        "async_scheduling",
        "max_num_batched_tokens",
        "max_num_seqs",
        "scheduler_cls",
    ),
    "vllm.config.speculative:SpeculativeConfig": ("method", "rejection_sample_method"),
}

# What only some release series have, and is read only there.
ONLY: dict[str, dict[str, tuple[str, ...]]] = {
    "0.32": {"vllm.envs:": ("VLLM_ROCM_MONO_DECODE",)},
    "0.33": {
        "vllm.config.kernel:KernelConfig": ("monokernel",),
        "vllm.config.vllm:VllmConfig": ("kernel_config",),
    },
}

# What is read, called or passed by name elsewhere, by the class (or, without a name, the module) that has it.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "vllm.envs:": ("VLLM_API_KEY", "VLLM_USE_RUST_FRONTEND"),
    "vllm.exceptions:": ("VLLMValidationError",),
    "vllm.distributed.parallel_state:": ("get_pp_group", "get_tp_group"),
    "vllm.distributed.parallel_state:GroupCoordinator": (
        "cpu_group",
        "is_first_rank",
        "is_last_rank",
        "world_size",
    ),
    "vllm.tokenizers:": ("cached_tokenizer_from_config",),
    "vllm.model_executor.models.utils:": ("PPMissingLayer",),
    "vllm.lora.request:LoRARequest": ("lora_name",),
    "vllm.sampling_params:": ("RequestOutputKind",),
    "vllm.sampling_params:SamplingParams": ("extra_args", "skip_reading_prefix_cache"),
    # In the engine core.
    "vllm.v1.engine:": ("EngineCoreOutput", "EngineCoreOutputs", "FinishReason"),
    "vllm.v1.engine:EngineCoreOutput": (
        "events",
        "finish_reason",
        "new_token_ids",
        "prefill_stats",
        "request_id",
        "spec_decode_metrics",
        "stop_reason",
        "trace_headers",
    ),
    "vllm.v1.engine:EngineCoreOutputs": ("outputs",),
    "vllm.v1.engine:EngineCoreRequest": ("prompt_embeds", "resumable", "sampling_params"),
    "vllm.v1.engine:FinishReason": ("ABORT",),
    "vllm.v1.request:Request": (
        "all_token_ids",
        "client_index",
        "drop_stale_output",
        "is_finished",
        "num_prompt_tokens",
        "num_stale_output_tokens",
        "num_tokens",
        "request_id",
        "sampling_params",
        "spec_decode_metrics",
        "take_events",
        "take_prefill_stats",
        "trace_headers",
    ),
    "vllm.v1.request:RequestStatus": ("FINISHED_ABORTED",),
    "vllm.v1.core.sched.scheduler:Scheduler": ("finish_requests", "kv_cache_manager", "requests"),
    "vllm.v1.core.kv_cache_manager:KVCacheManager": (
        "estimate_cached_tokens",
        "evict_blocks",
        "get_block_ids",
        "kv_cache_config",
    ),
    "vllm.v1.kv_cache_interface:KVCacheConfig": ("kv_cache_groups",),
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": ("kv_cache_spec",),
    "vllm.v1.kv_cache_interface:KVCacheSpec": ("block_size",),
    "vllm.v1.core.sched.output:SchedulerOutput": (
        "finished_req_ids",
        "num_scheduled_tokens",
        "scheduled_cached_reqs",
        "scheduled_new_reqs",
        "scheduled_spec_decode_tokens",
    ),
    "vllm.v1.core.sched.output:CachedRequestData": ("num_computed_tokens", "req_ids"),
    "vllm.v1.core.sched.output:NewRequestData": (
        "num_computed_tokens",
        "prefill_token_ids",
        "prompt_len",
        "prompt_token_ids",
        "req_id",
        "sampling_params",
    ),
    # In the workers.
    "vllm.v1.outputs:": ("AsyncModelRunnerOutput", "ModelRunnerOutput"),
    "vllm.v1.outputs:AsyncModelRunnerOutput": ("get_output",),
    "vllm.v1.outputs:ModelRunnerOutput": ("req_id_to_index", "sampled_token_ids"),
    "vllm.v1.worker.worker_base:WorkerBase": (
        "compile_or_warm_up_model",
        "model_config",
        "model_runner",
        "parallel_config",
    ),
    "vllm.v1.worker.cpu_worker:CPUWorker": ("compile_or_warm_up_model", "model_runner"),
    "vllm.v1.worker.gpu_worker:Worker": ("compile_or_warm_up_model", "model_runner"),
    f"{_RUNNER}:GPUModelRunner": (
        "device",
        "discard_request_mask",
        "get_model",
        "input_batch",
        "input_ids",
        "intermediate_tensors",
        "max_num_tokens",
        "model",
        "model_config",
        "vllm_config",
    ),
    "vllm.sequence:IntermediateTensors": ("__init__", "items"),
    "vllm.v1.worker.gpu_input_batch:InputBatch": (
        "generators",
        "num_computed_tokens_cpu",
        "num_reqs",
        "req_ids",
    ),
    f"{_RUNNER_V2}:GPUModelRunner": (
        "get_model",
        "max_num_tokens",
        "model_config",
        "model_state",
    ),
    "vllm.v1.worker.gpu.input_batch:InputBatch": (
        "input_ids",
        "num_computed_tokens_np",
        "num_scheduled_tokens",
        "num_tokens",
        "positions",
        "query_start_loc",
        "req_ids",
    ),
    # In the front end.
    "vllm.v1.engine.input_processor:InputProcessor": ("renderer",),
    "vllm.renderers.base:BaseRenderer": ("_executor",),
    "vllm.v1.engine.output_processor:RequestState": (
        "detokenizer",
        "logprobs_processor",
        "output_kind",
        "prompt_len",
    ),
    "vllm.v1.engine.logprobs:LogprobsProcessor": ("prompt_logprobs",),
    "vllm.v1.engine.detokenizer:IncrementalDetokenizer": ("num_output_tokens",),
    "vllm.outputs:CompletionOutput": ("finish_reason", "index", "stop_reason", "text"),
    "vllm.entrypoints.anthropic.protocol:": (
        "AnthropicDelta",
        "AnthropicMessagesResponse",
        "AnthropicStreamEvent",
    ),
    "vllm.entrypoints.anthropic.protocol:AnthropicDelta": ("stop_reason",),
    "vllm.entrypoints.anthropic.protocol:AnthropicMessagesResponse": ("stop_reason",),
    "vllm.entrypoints.launchers.run_batch:": ("make_error_request_output",),
    "vllm.entrypoints.launchers.run_batch:BatchRequestInput": ("body", "url"),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels": ("base_model_paths", "lora_requests"),
    "vllm.engine.protocol:EngineClient": ("collective_rpc", "vllm_config"),
    "vllm.v1.engine.core_client:AsyncMPClient": ("call_utility_all_async",),
}

# Architectures whose layers may hand on partial sums, or a part of the tokens, where several ranks share one:
# each rank would compute another activation. Which they are, the audit of vLLM's model sources finds.
TENSOR_PARALLEL_MODELS = {
    "BeamForCausalLM": "its layers leave the all-reduce to the next norm",
    "DeepseekV32ForCausalLM": "its layers leave the all-reduce to the next norm",
    "DeepseekV41ForCausalLM": "its layers leave the all-reduce to the next norm, or split the tokens",
    "DeepseekV4ForCausalLM": "a rule of its own lets its ranks split the tokens",
    "DeepseekV4ForConditionalGeneration": "a rule of its own lets its ranks split the tokens",
    "Dots3NoteForCausalLM": "its layers leave the all-reduce to the next norm",
    "Glm5NextForCausalLM": "its attention may be left unreduced",
    "Glm5NextForConditionalGeneration": "its attention may be left unreduced",
    "GlmMoeDsaForCausalLM": "its layers leave the all-reduce to the next norm",
    "InklingForCausalLM": "its layers reduce to a part of the width",
    "InklingForConditionalGeneration": "its layers reduce to a part of the width",
    "KimiK3ForConditionalGeneration": "its experts may leave the all-reduce to the next norm",
    "KimiLinearForCausalLM": "its experts may leave the all-reduce to the next norm",
    "MiniMaxM3SparseForCausalLM": "its layers leave the all-reduce to the next norm",
    "MiniMaxM3SparseForConditionalGeneration": "its layers leave the all-reduce to the next norm",
    "MuseSpark1xForCausalLM": "its layers leave the all-reduce to a norm, or split the tokens",
    "MuseSparkForConditionalGeneration": "its layers leave the all-reduce to a norm, or split the tokens",
    "Qwen4ExpForCausalLM": "its hyper-connections may split the tokens",
    "Qwen4ExpForConditionalGeneration": "its hyper-connections may split the tokens",
    "Step5ForCausalLM": "a rule of its own lets its ranks split the tokens",
    "Step5ForConditionalGeneration": "a rule of its own lets its ranks split the tokens",
}
