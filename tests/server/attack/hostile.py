"""Requests of a caller that would rather have the held features back."""

from __future__ import annotations

import json
import random
from typing import Any

from tests.server.attack.running import HELD
from tests.support.models import BOS, EOS, PAD, VOCAB
from tests.support.saes import D_SAE

__all__ = ["hostile_request"]

_OTHERS = [n for n in range(D_SAE) if n not in HELD]
_VALUES = (-1e6, -40.0, -1.0, 0.0, 1.0, 40.0, 1e6)
_OPS = ("clamp", "ablate", "scale", "add", "at_least", "at_most")


def hostile_request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A path and a body; most ask for steering, some of it for what is held."""
    path = rng.choice(list(_BODIES))
    body = {"model": "tiny", **_BODIES[path](rng)}
    how = rng.random()
    if how < 0.15:
        return path, body
    steering = _steering(rng)
    if how < 0.25 and path.startswith("/v1/c"):
        body["vllm_xargs"] = {"steering": json.dumps(steering)}
    elif how < 0.3 and path == "/inference/v1/generate":
        body["sampling_params"]["extra_args"] = {"steering": steering}
    else:
        body["steering"] = steering
    if rng.random() < 0.3 and path in _STREAMING:
        body["stream"] = True
    return path, body


def _steering(rng: random.Random) -> dict[str, Any]:
    changes = [_change(rng) for _ in range(rng.randint(1, 8))]
    own = {(c.get("sae"), c.get("feature", c.get("direction"))): c for c in changes}
    return {"interventions": list(own.values()), "error": "drop" if rng.random() < 0.1 else "keep"}


def _change(rng: random.Random) -> dict[str, Any]:
    op = rng.choice(_OPS)
    change: dict[str, Any] = {"op": op, **_target(rng)}
    if op != "ablate":
        change["value"] = rng.choice(_VALUES)
    if rng.random() < 0.5:
        change["where"] = _where(rng)
    if rng.random() < 0.3 and "sae" in change and change["sae"] != "late":
        bound = {rng.choice(("above", "below")): rng.choice((-1.0, 0.0, 0.5))}
        change["when"] = {"feature": rng.choice(HELD), **bound}
        change["latch"] = rng.random() < 0.5
    return change


def _target(rng: random.Random) -> dict[str, Any]:
    kind = rng.random()
    if kind < 0.04:
        return {"sae": "demo", "feature": rng.choice([*HELD, "legal"])}
    if kind < 0.3:
        # The same weights under another name.
        return {"sae": "twin", "feature": rng.choice(HELD)}
    if kind < 0.4:
        return {"direction": "french"}
    if kind < 0.5:
        return {"sae": "late", "feature": rng.choice([n for n in range(D_SAE) if n != 3])}
    return {"sae": rng.choice(("demo", "twin")), "feature": rng.choice(_OTHERS)}


def _where(rng: random.Random) -> dict[str, Any]:
    where: dict[str, Any] = {"phase": rng.choice(("all", "prompt", "generation"))}
    if rng.random() < 0.5:
        where["start"] = rng.randint(-4, 4)
    if rng.random() < 0.3:
        where["positions"] = [rng.randint(-3, 12) for _ in range(3)]
    if rng.random() < 0.3:
        where["exclude_tokens"] = [rng.randrange(3, VOCAB) for _ in range(4)]
    where["special_tokens"] = rng.random() < 0.7
    return where


def _ids(rng: random.Random) -> list[int]:
    """Special tokens among them, which steering leaves alone by default."""
    long = rng.random() < 0.1
    return [
        rng.choice((BOS, EOS, PAD)) if rng.random() < 0.1 else rng.randrange(3, VOCAB)
        for _ in range(rng.randint(100, 300) if long else rng.randint(1, 24))
    ]


def _words(rng: random.Random) -> str:
    return " ".join(f"w{rng.randrange(3, VOCAB)}" for _ in range(rng.randint(1, 16)))


def _turns(rng: random.Random) -> list[dict[str, str]]:
    return [{"role": "user", "content": _words(rng)}]


def _sampling(rng: random.Random) -> dict[str, Any]:
    return {
        "max_tokens": rng.randint(1, 12),
        "temperature": rng.choice((0, 0.7, 1.5)),
        "seed": rng.randrange(99),
    }


def _completion(rng: random.Random) -> dict[str, Any]:
    prompts = [_ids(rng) for _ in range(rng.choice((1, 1, 1, 3)))]
    prompt: Any = prompts[0] if len(prompts) == 1 else prompts
    return {"prompt": prompt, "n": rng.choice((1, 1, 4)), **_sampling(rng)}


_BODIES = {
    "/generative_scoring": lambda rng: {"query": _ids(rng), "items": [[7], [8]], "label_token_ids": [9, 10]},
    "/inference/v1/generate": lambda rng: {"token_ids": _ids(rng), "sampling_params": _sampling(rng)},
    "/invocations": _completion,
    "/v1/chat/completions": lambda rng: {"messages": _turns(rng), **_sampling(rng)},
    "/v1/chat/completions/batch": lambda rng: {"messages": [_turns(rng), _turns(rng)], **_sampling(rng)},
    "/v1/completions": _completion,
    "/v1/messages": lambda rng: {"messages": _turns(rng), "max_tokens": rng.randint(1, 12)},
    "/v1/responses": lambda rng: {"input": _words(rng), "max_output_tokens": rng.randint(1, 12)},
}
_STREAMING = (
    "/inference/v1/generate",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/responses",
)
