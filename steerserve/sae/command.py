"""`steerserve sae`: what an SAE's files hold, and whether every byte of them is sound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .formats import open_sae
from .sae import Sae
from .verify import verify_sae

__all__ = ["app", "describe"]

app = typer.Typer(help="Look at and check SAE checkpoints.", no_args_is_help=True)

PathArgument = Annotated[Path, typer.Argument(help="The SAE's folder, or the weights file inside it.")]


@app.command()
def inspect(
    path: PathArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what PATH holds and how it can be served, without reading its weights."""
    facts = describe(open_sae(path))
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, "not recorded" if value is None else str(value))
    Console().print(table)


@app.command()
def verify(path: PathArgument) -> None:
    """Read every byte of PATH: hashes against its manifest, and every weight for NaN and infinity.

    Starting a server leaves this out for files beyond 256 MiB. Exit code 2 names the first fault.
    """
    columns = (TextColumn("verify"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("verify", total=None)
        sae = verify_sae(path, lambda done, of: bar.update(task, completed=done, total=of))
    against = "its manifest" if sae.manifest else "no manifest: nothing vouches for its hashes"
    print(f"{path}: {sae.d_sae:,} features of width {sae.d_in:,}, every weight finite; {against}")


def describe(sae: Sae) -> dict[str, Any]:
    """The facts about an SAE that decide where and how it is served, as plain values."""
    served = "feature by feature" if sae.per_feature else "only with --resident"
    return {
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "hook": sae.hook.name if sae.hook else None,
        "k": sae.top_k,
        "normalisation": sae.normalisation,
        "weights": str(sae.path),
        "dtype": str(sae.stored.encoder.dtype).removeprefix("torch."),
        "maximum activations": "max_activation" in sae.statistics,
        "labels": len(sae.manifest.labels) if sae.manifest else 0,
        "served": f"not at all: {sae.refusal}" if sae.refusal else served,
        "because": sae.needs_resident,
    }
