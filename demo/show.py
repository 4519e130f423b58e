"""`make demo`: serve the demo model, steer it over the OpenAI API, show the replies side by side, stop.

python -m demo.show
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, OpenAIError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from demo.cards import read_cards
from demo.choose import ablation
from demo.corpus.labeller import label
from demo.prompts import DOMAIN_PROMPTS, NEUTRAL_PROMPTS
from demo.server import MODEL, DemoServer, ServerDied

__all__ = ["main"]

SHOWN = ("music", "weather", "colour")
ABLATED = "insult"
TOKENS = 24
# Rows of one report that are shown; an ablation may name sixteen features.
REPORTED = 4
SEED = 7


@dataclass(frozen=True)
class Reply:
    """A continuation and the report of what steered it (empty where nothing did)."""

    text: str
    report: dict[str, Any] = field(default_factory=dict)


Show = Callable[[AsyncOpenAI, Console, dict[str, Any]], Awaitable[bool]]


async def complete(
    client: AsyncOpenAI, prompt: str, interventions: list[dict[str, Any]] | None = None, **settings: Any
) -> Reply:
    """One completion, steered where interventions are given."""
    body = {"steering": {"interventions": interventions}} if interventions else None
    asked = {"temperature": 0.8, "max_tokens": TOKENS, "seed": SEED} | settings
    reply = await client.completions.create(model=MODEL, prompt=prompt, extra_body=body, **asked)
    return Reply(reply.choices[0].text, (reply.model_extra or {}).get("steering", {}))


async def show_clamps(client: AsyncOpenAI, console: Console, cards: dict[str, Any]) -> bool:
    """The same neutral prompts: unsteered, and with one domain's feature held high."""
    plans = {"unsteered": [], **{domain: label_clamp(cards, domain) for domain in SHOWN}}
    table = Table(
        "prompt", *plans, title="One feature clamped per request, all in one batch", show_lines=True
    )
    prompts = NEUTRAL_PROMPTS[:4]
    jobs = [complete(client, prompt, plan) for prompt in prompts for plan in plans.values()]
    replies = await asyncio.gather(*jobs)
    rows = [replies[at : at + len(plans)] for at in range(0, len(replies), len(plans))]
    for prompt, row in zip(prompts, rows, strict=True):
        table.add_row(prompt, *map(written, row))
    console.print(table)
    show_reports(console, {f"clamp {name}": reply for name, reply in zip(plans, rows[0], strict=True)})
    wanted = [reply.text for row in rows for reply in row[1:]]
    plain = [row[0].text for row in rows for _ in row[1:]]
    return all(steered != unsteered for steered, unsteered in zip(wanted, plain, strict=True))


async def show_ablation(client: AsyncOpenAI, console: Console, cards: dict[str, Any]) -> bool:
    """Prompts that ask for an insult: unsteered, and with the insult features taken away."""
    plan = ablation(cards[ABLATED]["ablate"])
    table = Table("prompt", "unsteered", "ablated", title=f"The {ABLATED} features ablated", show_lines=True)
    prompts = DOMAIN_PROMPTS[ABLATED][:4]
    plain = await asyncio.gather(*(complete(client, prompt) for prompt in prompts))
    ablated = await asyncio.gather(*(complete(client, prompt, plan) for prompt in prompts))
    for prompt, before, after in zip(prompts, plain, ablated, strict=True):
        table.add_row(prompt, written(before), written(after))
    console.print(table)
    show_reports(console, {f"ablate {ABLATED}": ablated[0]})
    return any(before.text != after.text for before, after in zip(plain, ablated, strict=True))


async def show_stream(client: AsyncOpenAI, console: Console, cards: dict[str, Any]) -> bool:
    """A steered reply as it streams; the report is in the last chunk."""
    domain = SHOWN[0]
    console.print(f"\n[bold]Streamed, {domain} clamped:[/] {NEUTRAL_PROMPTS[6]}", end="")
    stream = await client.completions.create(
        model=MODEL,
        prompt=NEUTRAL_PROMPTS[6],
        max_tokens=2 * TOKENS,
        temperature=0.8,
        seed=SEED,
        stream=True,
        extra_body={"steering": {"interventions": label_clamp(cards, domain)}},
    )
    report: dict[str, Any] = {}
    async for chunk in stream:
        report = (chunk.model_extra or {}).get("steering") or report
        for choice in chunk.choices:
            console.print(choice.text, end="", style="cyan", markup=False, highlight=False)
    console.print()
    return bool(report)


async def show_isolation(client: AsyncOpenAI, console: Console, cards: dict[str, Any]) -> bool:
    """An unsteered request alone, and again beside steered ones in its batch: the same tokens."""
    prompt = NEUTRAL_PROMPTS[0]
    alone = await complete(client, prompt, temperature=0)
    beside = [complete(client, prompt, label_clamp(cards, domain), temperature=0) for domain in SHOWN]
    crowded, *steered = await asyncio.gather(complete(client, prompt, temperature=0), *beside)
    same = alone.text == crowded.text
    verdict = "[green]not one token changed[/]" if same else "[red]it changed[/]"
    console.print(f"\n[bold]The unsteered request beside {len(steered)} steered ones:[/] {verdict}")
    return same and all(reply.text != alone.text for reply in steered)


SHOWS: tuple[Show, ...] = (show_clamps, show_ablation, show_stream, show_isolation)


def label_clamp(cards: dict[str, Any], domain: str) -> list[dict[str, Any]]:
    """The clamp that the domain's card names, with the feature by its label."""
    return [{"feature": domain, "op": "clamp", **cards[domain]["clamp"]}]


def written(reply: Reply) -> Text:
    """The text with the grammar's own verdict under it."""
    return Text.assemble(reply.text.strip(), "\n", (f"→ {label(reply.text)}", "bold cyan"))


def show_reports(console: Console, replies: dict[str, Reply]) -> None:
    """What the server counted for each reply: the proof that steering happened."""
    columns = ("request", "feature", "op", "tokens", "mean before → after", "max before → after")
    table = Table(*columns, title="Reports")
    for name, reply in replies.items():
        for entry in reply.report.get("interventions", [])[:REPORTED]:
            before, after = entry["before"] or {}, entry["after"] or {}
            spans = (f"{before.get(key, 0):.2f} → {after.get(key, 0):.2f}" for key in ("mean", "max"))
            table.add_row(name, str(entry["feature"]), entry["op"], str(entry["tokens"]), *spans)
    console.print(table)


async def show_all(server: DemoServer, console: Console, cards: dict[str, Any]) -> list[str]:
    """Run every part; returns the names of those that did not hold."""
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        return [show.__name__ for show in SHOWS if not await show(client, console, cards)]


def main() -> None:
    """The command line; exit code 1 if the server died or a part did not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, default=Path("sae_weights/demo"), help="folder of the assets")
    given = parser.parse_args()
    console = Console()
    try:
        with DemoServer(given.demo) as server:
            with console.status(f"starting vLLM on {server.url} (log: {server.log})"):
                server.wait()
            failed = asyncio.run(show_all(server, console, read_cards(given.demo)))
    except (ServerDied, OpenAIError) as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False)
        sys.exit(1)
    if failed:
        console.print("[red]did not hold:[/]", ", ".join(failed))
        sys.exit(1)


if __name__ == "__main__":
    main()
