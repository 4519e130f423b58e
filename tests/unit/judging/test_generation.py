from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from steerserve.judging.generation import Request, continuations, nats
from steerserve.judging.hooked import HookedModel
from tests.support.models import D_MODEL
from tests.support.reference import Reference

from .conftest import LAYER, WORDS

TOKENS = 6


def greedy(model: HookedModel, requests: list[Request]) -> list[list[int]]:
    return continuations(model, requests, tokens=TOKENS, temperature=0, seed=0)


def test_requests_of_one_batch_are_steered_each_as_the_reference_steers_it_alone(
    model: HookedModel, llama: Path
) -> None:
    unit = torch.nn.functional.normalize(torch.ones(D_MODEL), dim=0)
    reference = Reference(llama, {}, {"up": (unit, LAYER + 1)})
    prompts = [model.encode(text, 99) for text in WORDS]
    strengths = [0.0, 6.0, -6.0]
    found = greedy(
        model, [Request(p, s * unit if s else None) for p, s in zip(prompts, strengths, strict=True)]
    )
    for prompt, strength, ours in zip(prompts, strengths, found, strict=True):
        steering = [{"direction": "up", "op": "add", "value": strength}]
        theirs: list[int] = []
        while len(theirs) < TOKENS:
            logprobs = reference.all_logprobs(prompt + theirs, len(prompt), steering)
            theirs.append(int(logprobs[-1].argmax()))
        assert ours == theirs


def test_the_same_seed_samples_the_same_and_leaves_the_global_generator_alone(model: HookedModel) -> None:
    requests = [Request(model.encode(text, 99)) for text in WORDS] * 3
    state = torch.random.get_rng_state()
    runs = [continuations(model, requests, tokens=5, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert runs[0] == runs[1] != runs[2]


def test_nats_are_the_mean_cross_entropy_of_the_continuation(model: HookedModel) -> None:
    pairs = [([0, 5, 9], [30, 8, 77]), ([0], [12]), ([0, 4, 4, 4, 4], [])]
    found = nats(model, pairs)
    for (context, told), ours in zip(pairs[:2], found, strict=False):
        with torch.no_grad():
            logits = model.model(torch.tensor([context + told])).logits[0, len(context) - 1 : -1]
        assert ours == pytest.approx(float(cross_entropy(logits, torch.tensor(told))), rel=1e-4)
    assert found[2] != found[2]
