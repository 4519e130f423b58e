"""`steerserve policy`: what a folder of policies holds, and everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from steerserve.access.key_file import read_key_file
from steerserve.catalog import Catalog, build_catalog
from steerserve.config import parse_config
from steerserve.errors import ConfigError, PolicyError
from steerserve.sae import open_sae, read_direction
from steerserve.spec import Intervention

from .compiled import check_policies
from .document import Policy, Watch, parse_policy
from .files import list_folder, read_file
from .known_names import KnownNames

__all__ = ["app"]

_ANY_LAYERS = 2**31

app = typer.Typer(help="Look at and check policies.", no_args_is_help=True)

FolderArgument = Annotated[Path, typer.Argument(help="The folder of policies, one .yaml file for each.")]


@app.command()
def check(
    folder: FolderArgument,
    sae: Annotated[
        list[str] | None,
        typer.Option(help="An SAE that will be served, NAME=PATH. May be given several times."),
    ] = None,
    direction: Annotated[
        list[str] | None,
        typer.Option(help="A direction that will be served, NAME=PATH. May be given several times."),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Decoder layers of the model; any number where it is left out.")
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            min=1, help="Width of the model's residual stream; the first SAE's where it is left out."
        ),
    ] = None,
    max_interventions: Annotated[
        int, typer.Option(min=1, max=64, help="As the server will be started with.")
    ] = 16,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A name of the model or of a LoRA. If any is given, policies may name no other."),
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="The key file. If given, policies may name no other key.")
    ] = None,
) -> None:
    """Say everything that is wrong with the policies in FOLDER; exit code 1 if anything is.

    With the SAEs and directions that will be served, every feature, label and unit is looked up too. Special
    tokens are the model's, and are not.
    """
    catalog = _catalog(folder, sae or [], direction or [], layers, width, max_interventions)
    policies, problems = _parse(folder)
    if catalog is not None:
        problems += _against(catalog, policies)
    problems += _unknown_names(policies, KnownNames(model, None if keys is None else _key_names(keys)))
    console = Console(soft_wrap=True)
    console.print(_table(policies))
    for problem in problems:
        console.print(f"[red]{escape(problem)}[/red]", highlight=False)
    if problems:
        raise typer.Exit(1)
    against = "and what will be served" if catalog else "as documents, without SAEs"
    console.print(f"{len(policies)} policies checked {against}: nothing is wrong")


@app.command()
def show(folder: FolderArgument) -> None:
    """List the policies in FOLDER with what each of them does."""
    policies, problems = _parse(folder)
    if problems:
        raise PolicyError(problems[0])
    console = Console(soft_wrap=True)
    console.print(_table(policies))
    for policy in policies:
        console.print(f"\n{policy.name}: {policy.reason.strip()}", markup=False, highlight=False)
        for line in _effects(policy):
            console.print(f"  {line}", markup=False, highlight=False)


def _parse(folder: Path) -> tuple[list[Policy], list[str]]:
    """The documents that are sound, and what is wrong with the others."""
    policies: dict[str, Policy] = {}
    problems = []
    for name, *_ in list_folder(folder):
        try:
            policy = parse_policy(name, read_file(folder / name))
        except PolicyError as error:
            problems.append(str(error))
            continue
        if policy.name in policies:
            problems.append(f"{name}: expected one file for each policy, got another of {policy.name!r}")
        policies.setdefault(policy.name, policy)
    return list(policies.values()), problems


def _against(catalog: Catalog, policies: Sequence[Policy]) -> list[str]:
    """What cannot be enforced: of each policy by itself, and then of all that can be."""
    problems, sound = [], []
    for policy in policies:
        problem = _problem([policy], catalog)
        if problem is None:
            sound.append(policy)
        else:
            problems.append(problem)
    together = _problem(sound, catalog)
    return [*problems, together] if together else problems


def _unknown_names(policies: Sequence[Policy], known: KnownNames) -> list[str]:
    return [
        f"policy `{name}`: expected names that are known, got {', '.join(map(repr, missing))}"
        for name, missing in known.missing_by_policy(policies).items()
    ]


def _key_names(path: Path) -> list[str]:
    file, _ = read_key_file(path)
    return [key.name for key in file.keys]


def _problem(policies: Sequence[Policy], catalog: Catalog) -> str | None:
    try:
        check_policies(policies, catalog)
    except PolicyError as error:
        return str(error)
    return None


def _catalog(
    folder: Path,
    saes: list[str],
    directions: list[str],
    layers: int | None,
    width: int | None,
    max_interventions: int,
) -> Catalog | None:
    if not saes and not directions:
        return None
    served = {
        # Whether one is resident is for the server to say: it changes nothing that a policy may name.
        "saes": [{**_named(value), "resident": True} for value in saes],
        "directions": [_named(value) for value in directions],
        "max_interventions": max_interventions,
        "policies": folder,
    }
    config = parse_config({"steerserve": served})
    assert config is not None
    if width is None:
        width = open_sae(config.saes[0].path).d_in if config.saes else _width(config.directions[0].path)
    return build_catalog(config, n_layers=layers or _ANY_LAYERS, d_model=width)


def _width(path: Path) -> int:
    return int(read_direction(path).vector.shape[0])


def _named(value: str) -> dict[str, str]:
    name, equals, path = value.partition("=")
    if not (name and equals and path):
        raise ConfigError(f"expected NAME=PATH, got {value!r}")
    return {"name": name, "path": path}


def _table(policies: Sequence[Policy]) -> Table:
    table = Table(box=None)
    for heading in ("policy", "version", "mode", "owner", "applies to", "changes", "watches"):
        table.add_column(heading, overflow="fold")
    for policy in policies:
        counts = (str(len(policy.interventions)), str(len(policy.watch)))
        cells = (policy.name, f"{policy.version}", policy.mode, policy.owner, _scope(policy), *counts)
        table.add_row(*map(escape, cells))
    return table


def _scope(policy: Policy) -> str:
    limits = [f"{kind}: {', '.join(names)}" for kind, names in policy.applies if names]
    return "; ".join(limits) or "everything"


def _effects(policy: Policy) -> list[str]:
    changes = [
        f"{change.op} {_target(change)}"
        + (f" {change.value:g} {change.unit}" if change.value is not None else "")
        for change in policy.interventions
    ]
    watches = [f"watch {watch.name}: {_target(watch)} > {watch.above:g}" for watch in policy.watch]
    return changes + watches


def _target(what: Intervention | Watch) -> str:
    if what.direction is not None:
        return f"direction {what.direction}"
    return f"feature {what.feature}" + (f" of {what.sae}" if what.sae else "")
