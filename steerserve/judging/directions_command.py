"""`steerserve directions`: directions of the residual stream from labelled texts, ready to be served."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.table import Table

from steerserve.errors import ConfigError
from steerserve.sae import Direction, Hook, write_direction
from steerserve.training.shards import ShardReader

from .directions import Method, make_directions
from .hooked import accelerator, load_model, parse_site
from .run import progress_bar
from .texts import (
    Text,
    TokenTable,
    check_new,
    collect,
    from_shards,
    labels_of,
    read_labelled,
    split,
)

__all__ = ["directions_command"]


def directions_command(
    model: Annotated[str, typer.Argument(help="Language model: a folder in Hugging Face's layout.")],
    texts: Annotated[Path, typer.Option(help="JSONL with `text` and `label`.")],
    layer: Annotated[int, typer.Option(min=0, help="Decoder layer whose residual stream is read.")],
    out: Annotated[Path, typer.Option(help="New folder: a safetensors file for each label.")],
    method: Annotated[str, typer.Option(help="diffmean or probe.")] = "diffmean",
    hook: Annotated[str, typer.Option(help="resid_post or resid_pre of that layer.")] = "resid_post",
    label: Annotated[
        list[str] | None, typer.Option(help="Only this label. May be given several times.")
    ] = None,
    shards: Annotated[
        Path | None, typer.Option(help="A harvest of exactly these texts, in place of running the model.")
    ] = None,
    held_out: Annotated[
        float, typer.Option(min=0.01, max=0.99, help="Share of each label's texts for the AUROC.")
    ] = 0.2,
    text_tokens: Annotated[int, typer.Option(min=2, help="Tokens of one text; the rest is cut off.")] = 256,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; the accelerator if there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
) -> None:
    """Make a direction of the residual stream for each label, by difference of means or a linear probe.

    `steerserve serve --direction NAME=OUT/NAME.safetensors` serves them.
    """
    check_new(out)
    if method not in ("diffmean", "probe"):
        raise ConfigError(f"expected --method diffmean or probe, got {method!r}")
    place = Hook(layer, parse_site(hook))
    labelled = read_labelled(texts, labelled=True)
    counts = Counter(name for _, name in labelled)
    if single := [name for name, count in counts.items() if count < 2]:
        raise ConfigError(f"expected at least two texts of each label, got one of {single}")
    if shards is not None:
        choose, measure = _harvested(shards, place, labelled).divided(held_out, seed)
    else:
        choose, measure = _read(
            model, place, device or accelerator(), split(labelled, held_out, seed), text_tokens
        )
    wanted = label or list(choose.labels)
    if unknown := sorted(set(wanted) - set(choose.labels)):
        raise ConfigError(f"expected --label among {list(choose.labels)}, got {unknown}")
    made = make_directions(choose, measure, place, cast(Method, method))
    _write([direction for direction in made if direction.name in wanted], method, out)


def _harvested(folder: Path, hook: Hook, texts: Sequence[Text]) -> TokenTable:
    reader = ShardReader(folder)
    if reader.hook != hook:
        raise ConfigError(f"expected a harvest at {hook.name}, {folder} is of {reader.hook.name}")
    return from_shards(reader, texts, labels_of(texts))


def _read(
    model: str, hook: Hook, device: str, halves: tuple[list[Text], list[Text]], limit: int
) -> tuple[TokenTable, TokenTable]:
    opened = load_model(model, hook, device)
    labels = labels_of(halves[0])
    with progress_bar() as bar:
        task = bar.add_task(f"texts at {hook.name}", total=sum(len(half) for half in halves))
        choose, measure = (
            collect(opened, half, labels, limit=limit, progress=lambda count: bar.advance(task, count))
            for half in halves
        )
    return choose, measure


def _write(directions: Sequence[Direction], method: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    table = Table("direction", "max", "mean inside", "mean outside", "AUROC", "AUROC by text")
    for direction, name in zip(directions, _names(directions), strict=True):
        path = out / f"{name}.safetensors"
        write_direction(path, direction)
        keys = ("max_activation", "mean_inside", "mean_outside", "auroc", "auroc_texts")
        table.add_row(direction.name, *(f"{direction.statistics[key]:.3f}" for key in keys))
    summary = {"method": method, "directions": {one.name: dict(one.statistics) for one in directions}}
    (out / "directions.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    console = Console()
    console.print(table)
    console.print(f"{len(directions)} safetensors files in {out}", highlight=False)


def _names(directions: Sequence[Direction]) -> list[str]:
    """A file name for each label; labels that look the same in a file name are numbered."""
    plain = [
        re.sub(r"[^A-Za-z0-9._-]+", "-", direction.name).strip("-.") or "direction"
        for direction in directions
    ]
    seen: Counter[str] = Counter()
    out = []
    for name in plain:
        seen[name] += 1
        out.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return out
