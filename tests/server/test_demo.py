"""The committed demo, over HTTP: its features do to the model's text what their cards promise."""

from __future__ import annotations

import asyncio
import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI
from rich.console import Console

from demo.cards import read_cards
from demo.choose import ablation, clamp
from demo.corpus.labeller import label
from demo.corpus.sentences import DOMAINS
from demo.prompts import DOMAIN_PROMPTS, NEUTRAL_PROMPTS
from demo.server import MODEL, DemoServer
from demo.show import show_all
from demo.steer import TEMPERATURE, TOKENS
from steerserve.sae import open_sae
from steerserve.sae.files import sha256_of
from tests.support.one import OneAtATime
from tests.support.times import starting

ASSETS = Path(__file__).parents[2] / "sae_weights" / "demo"
CARDS = read_cards(ASSETS)
SEED = 4242
SAMPLES = 2

Wanted = dict[str, tuple[tuple[str, ...], list[dict[str, Any]]]]


@pytest.fixture(autouse=True)
def _log_on_failure() -> None:
    """Instead of the folder's fixture of this name, which would start the folder's server too."""


@pytest.fixture(scope="module")
def demo(running: OneAtATime) -> DemoServer:
    @contextmanager
    def start() -> Iterator[DemoServer]:
        with DemoServer(ASSETS) as server:
            with starting():
                server.wait()
            yield server

    return running.get("demo", start)


def labels(server: DemoServer, wanted: Wanted, samples: int = SAMPLES) -> dict[str, Counter[str]]:
    """What the labeller says of every continuation, for each named (prompts, interventions), all at once."""

    async def one(client: AsyncOpenAI, prompts: tuple[str, ...], plan: list[dict[str, Any]]) -> Counter[str]:
        reply = await client.completions.create(
            model=MODEL,
            prompt=list(prompts),
            n=samples,
            seed=SEED,
            temperature=TEMPERATURE,
            max_tokens=TOKENS,
            extra_body={"steering": {"interventions": plan}} if plan else None,
        )
        return Counter(label(choice.text) for choice in reply.choices)

    async def every() -> list[Counter[str]]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=240) as client:
            return list(await asyncio.gather(*(one(client, *group) for group in wanted.values())))

    return dict(zip(wanted, asyncio.run(every()), strict=True))


def share(counts: Counter[str], domain: str) -> float:
    return counts[domain] / counts.total()


def test_clamping_a_domains_feature_makes_four_fifths_of_neutral_continuations_its_own(
    demo: DemoServer,
) -> None:
    wanted: Wanted = {
        domain: (NEUTRAL_PROMPTS, clamp(domain, CARDS[domain]["clamp"]["value"])) for domain in DOMAINS
    }
    found = labels(demo, wanted)
    shares = {domain: share(found[domain], domain) for domain in DOMAINS}
    assert sum(value >= 0.8 for value in shares.values()) >= 8, shares


def test_unsteered_neutral_prompts_stay_near_each_domains_base_rate(demo: DemoServer) -> None:
    found = labels(demo, {"unsteered": (NEUTRAL_PROMPTS, [])}, samples=4)["unsteered"]
    shares = {domain: share(found, domain) for domain in DOMAINS}
    assert max(shares.values()) <= 0.2, shares


def test_ablating_a_domains_features_at_least_halves_its_share_on_its_own_prompts(demo: DemoServer) -> None:
    before = labels(demo, {domain: (DOMAIN_PROMPTS[domain], []) for domain in DOMAINS}, samples=4)
    wanted: Wanted = {
        domain: (DOMAIN_PROMPTS[domain], ablation(CARDS[domain]["ablate"])) for domain in DOMAINS
    }
    after = labels(demo, wanted, samples=4)
    shares = {domain: (share(before[domain], domain), share(after[domain], domain)) for domain in DOMAINS}
    assert sum(left <= own / 2 for own, left in shares.values()) >= 8, shares


def test_what_make_demo_shows_holds(demo: DemoServer) -> None:
    shown = io.StringIO()
    failed = asyncio.run(show_all(demo, Console(file=shown, width=160), CARDS))
    assert not failed, shown.getvalue()
    assert "not one token changed" in shown.getvalue()


def test_every_domain_labels_exactly_one_feature_and_its_card_says_the_same() -> None:
    manifest = open_sae(ASSETS / "sae").manifest
    assert manifest is not None
    for domain in DOMAINS:
        assert [item.feature for item in manifest.labels if item.label == domain] == [
            CARDS[domain]["feature"]
        ]


def test_the_sae_was_made_for_the_model_beside_it() -> None:
    manifest = open_sae(ASSETS / "sae").manifest
    assert manifest is not None
    assert manifest.model.sha256 == sha256_of(ASSETS / "model" / "model.safetensors")


def test_model_and_sae_stay_under_40_megabytes() -> None:
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 40e6
