"""`steerserve sae`: what an SAE's files hold, whether they are sound, and the same SAE in SAELens' layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from steerserve.errors import ConfigError

from .convert import convert_sae
from .formats import recognise
from .hook import Hook, parse_hook
from .sae import Sae
from .verify import verify_sae

__all__ = ["app", "describe"]

app = typer.Typer(help="Look at, check and convert SAE checkpoints.", no_args_is_help=True)

PathArgument = Annotated[Path, typer.Argument(help="The SAE's folder, or the weights file inside it.")]


@app.command()
def inspect(
    path: PathArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what PATH holds, in whose layout, and how it can be served."""
    found = recognise(path)
    facts = {"layout": found.layout, **describe(found.open())}
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
    with _bar("verify") as advance:
        sae = verify_sae(path, advance)
    against = "its manifest" if sae.manifest else "no manifest: nothing vouches for its hashes"
    print(f"{path}: {sae.d_sae:,} features of width {sae.d_in:,}, every weight finite; {against}")


@app.command()
def convert(
    path: PathArgument,
    out: Annotated[Path, typer.Argument(help="A folder that is not there yet.")],
    model: Annotated[
        str | None, typer.Option(help="The model it was trained on, where its files do not say.")
    ] = None,
    hook: Annotated[
        str | None, typer.Option(help="blocks.LAYER.hook_resid_post, where its files do not say.")
    ] = None,
) -> None:
    """Write PATH to OUT in SAELens' layout, with a manifest; statistics and labels are kept.

    OUT appears when all of it is written. What SAELens cannot compute exactly is refused.
    """
    with _bar("convert") as advance:
        convert_sae(path, out, model=model, hook=_hook(hook), progress=advance)
    print(f"{out}: written, every weight finite; sae_lens loads it with SAE.load_from_disk")


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr. Yields: what to tell the bytes done and the bytes to do."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def _hook(name: str | None) -> Hook | None:
    hook = None if name is None else parse_hook(name)
    if name is not None and hook is None:
        raise ConfigError(f"expected --hook blocks.LAYER.hook_resid_post or hook_resid_pre, got {name!r}")
    return hook


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
