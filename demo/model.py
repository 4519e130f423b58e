"""Train the demo's language model: a small Llama over the generated corpus, on the CPU, in minutes.

python -m demo.model --out sae_weights/demo/model --seed 0
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from demo.corpus.documents import labelled_documents, tokenise
from demo.tokenizer import VOCABULARY, tokenizer_texts, train_tokenizer

MAX_POSITIONS = 2048
BLOCK = 256
BATCH = 16
PEAK_RATE = 3e-3
WARM_UP = 100
STEPS = 450
# Held-out documents come from a seed that training never uses.
HELD_OUT_SEED = 1_000_003
HELD_OUT_TOKENS = 40_000
LOG_EVERY = 50


def build_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """An untrained model of five million parameters. head_dim is 64: attention kernels want 32 or more."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def blocks(seed: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Endless packed blocks of ``BLOCK`` tokens, documents one after another; no block comes twice."""
    pending: list[int] = []
    for part in count():
        for document in labelled_documents(seed + part, 1000):
            pending.extend(tokenise(document, tokenizer)[0])
            while len(pending) >= BLOCK:
                yield pending[:BLOCK]
                del pending[:BLOCK]


def rate_at(step: int, steps: int) -> float:
    """Learning rate: linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(1, steps - WARM_UP)
    return PEAK_RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def loss_of(model: Callable[..., Any], ids: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats over ids [batch, BLOCK]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: Callable[..., Any], tokenizer: PreTrainedTokenizerBase) -> float:
    """Mean loss in nats per token on documents that training never sees."""
    held_out = blocks(HELD_OUT_SEED, tokenizer)
    batches = HELD_OUT_TOKENS // (BLOCK * BATCH)
    losses = [loss_of(model, _batch(held_out)).item() for _ in range(batches)]
    return sum(losses) / len(losses)


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, seed: int, steps: int, log: Path
) -> None:
    """Train ``model`` in place, one pass over fresh blocks, writing one JSON line per LOG_EVERY steps."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)
    stream = blocks(10_000 * (seed + 1), tokenizer)
    compiled = torch.compile(model)  # the weights stay those of `model`
    began = time.monotonic()
    with _progress() as progress, log.open("w", encoding="utf-8") as lines:
        task = progress.add_task("training", total=steps, loss=float("nan"))
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = rate_at(step, steps)
            loss = loss_of(compiled, _batch(stream))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            progress.update(task, advance=1, loss=loss.item())
            if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
                record = {
                    "step": step + 1,
                    "tokens": (step + 1) * BLOCK * BATCH,
                    "loss": round(loss.item(), 4),
                }
                if (step + 1) % (5 * LOG_EVERY) == 0 or step + 1 == steps:
                    record["held_out_loss"] = round(held_out_loss(model, tokenizer), 4)
                lines.write(json.dumps(record | {"seconds": round(time.monotonic() - began, 1)}) + "\n")
                lines.flush()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, log: Path, out: Path) -> None:
    """Write everything to a folder beside ``out``, then swap it in, so that ``out`` is always whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.8,
    )
    model.to(torch.bfloat16).save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    shutil.copy(log, fresh / "training.jsonl")
    fresh.chmod(0o755)
    stale = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
    if out.exists():
        out.rename(stale / out.name)
    fresh.rename(out)
    shutil.rmtree(stale)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write the model and its tokenizer to"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and corpus (default 0)")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"steps of {BATCH * BLOCK} tokens (default {STEPS})"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = train_tokenizer(tokenizer_texts(arguments.seed), MAX_POSITIONS)
    model = build_model(tokenizer, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "training.jsonl"
        train(model, tokenizer, arguments.seed, arguments.steps, log)
        save(model, tokenizer, log, arguments.out)
        print(log.read_text(encoding="utf-8").splitlines()[-1])


def _batch(stream: Iterator[list[int]]) -> Tensor:
    return torch.tensor([next(stream) for _ in range(BATCH)])


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )


if __name__ == "__main__":
    main()
