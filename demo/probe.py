"""Probe the demo's model: where neutral prompts lead, unsteered and under each domain's mean difference.

python -m demo.probe --model sae_weights/demo/model
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.corpus.documents import NONE, labelled_documents, tokenise
from demo.corpus.labeller import label
from demo.corpus.sentences import ALL_DOMAINS, DOMAINS
from demo.prompts import NEUTRAL_PROMPTS
from demo.zoo import LAYER

PROBE_SEED = 2_000_003


@torch.no_grad()
def domain_means(model: Any, tokenizer: Any, layer: int, documents: int) -> tuple[dict[str, Tensor], Tensor]:
    """Mean residual stream after ``layer`` per domain [d], and over all labelled tokens [d]."""
    sums = {domain: torch.zeros(model.config.hidden_size) for domain in ALL_DOMAINS}
    counts: Counter[str] = Counter()
    for document in labelled_documents(PROBE_SEED, documents):
        ids, domains = tokenise(document, tokenizer)
        stream = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]
        for domain in set(domains) - {NONE}:
            inside = torch.tensor([name == domain for name in domains])
            sums[domain] += stream[inside].sum(0)
            counts[domain] += int(inside.sum())
    overall = torch.stack(list(sums.values())).sum(0) / sum(counts.values())
    return {domain: total / counts[domain] for domain, total in sums.items()}, overall


@contextmanager
def added(model: Any, layer: int, vector: Tensor) -> Iterator[None]:
    """While open, ``vector`` is added after ``layer`` at the last position of every forward pass.

    That is generation as the server defines it: from the last prompt token on.
    """

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        steered = output.clone()
        steered[:, -1] += vector.to(output.dtype)
        return steered

    handle = model.model.layers[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def continuations(model: Any, tokenizer: Any, samples: int, tokens: int) -> list[str]:
    """``samples`` continuations of every neutral prompt at temperature 0.8, prompts left out."""
    # Padded on the left, so that the last position is the last prompt token in every row.
    batch = tokenizer(list(NEUTRAL_PROMPTS), return_tensors="pt", padding=True, padding_side="left")
    output = model.generate(
        **batch,
        max_new_tokens=tokens,
        do_sample=True,
        temperature=0.8,
        top_k=0,
        num_return_sequences=samples,
    )
    texts: list[str] = tokenizer.batch_decode(
        output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return texts


def shares(texts: list[str]) -> dict[str, float]:
    """The share of each label among ``texts``, most frequent first."""
    counts = Counter(label(text) for text in texts)
    return {domain: round(count / len(texts), 3) for domain, count in counts.most_common()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the trained model")
    parser.add_argument("--samples", type=int, default=4, help="continuations per neutral prompt (default 4)")
    parser.add_argument("--tokens", type=int, default=40, help="tokens per continuation (default 40)")
    parser.add_argument("--scales", type=float, nargs="+", default=[1, 2, 3], help="multiples of the vector")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(arguments.model)
    base = continuations(model, tokenizer, 5 * arguments.samples, arguments.tokens)
    print("unsteered", shares(base))
    for text in base[:: 5 * arguments.samples + 1]:
        print("   ", repr(text))
    means, overall = domain_means(model, tokenizer, LAYER, 300)
    for domain in DOMAINS:
        for scale in arguments.scales:
            with added(model, LAYER, scale * (means[domain] - overall)):
                texts = continuations(model, tokenizer, arguments.samples, arguments.tokens)
            share = shares(texts)
            print(f"{domain:8} x{scale:g} {share.get(domain, 0):.2f} {share}")
            for text in (texts[0], texts[-1]):
                print("   ", repr(text))


if __name__ == "__main__":
    main()
