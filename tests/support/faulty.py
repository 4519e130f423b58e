"""A Llama of vLLM's with a fault that real models have, and the engine that should refuse it.

`python -m tests.support.faulty FAULT MODEL SAE RANKS` starts it. The fault is put in by the import of
`tests.support.faults.FAULT` in the workers, as a `worker_extension_cls`.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Start the engine; it fails, and what its workers say is on stderr."""
    from vllm import LLM

    fault, model, sae, ranks = sys.argv[1:]
    LLM(
        model,
        additional_config={"steerserve": {"saes": [{"name": "a", "path": sae}]}},
        worker_extension_cls=f"tests.support.faults.{fault}.Extension",
        tensor_parallel_size=int(ranks),
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_batched_tokens=64,
        max_num_seqs=4,
        block_size=32,
        gpu_memory_utilization=0.2,
    )


if __name__ == "__main__":
    main()
