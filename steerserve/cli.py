"""The `steerserve` command."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .access.binding import check_binding
from .access.command import app as keys_app
from .access.key_file import read_key_file
from .audit.command import app as audit_app
from .catalog import check_served
from .config import SteerserveConfig, parse_config
from .errors import ConfigError, SteerserveError
from .experiments.command import app as experiment_app
from .judging.command import eval_command
from .judging.directions_command import directions_command
from .policy import PolicyFolder
from .policy.command import app as policy_app
from .sae import open_sae, read_direction
from .sae.command import app as sae_app
from .theory.command import scaling, toy
from .training.command import train

__all__ = ["app", "main", "serve_command"]

PLUGIN = "steerserve"

app = typer.Typer(
    help="Steer language models by the features of sparse autoencoders, inside stock vLLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=_PASS_ON)
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model folder or name, as `vllm serve` takes it.")],
    sae: Annotated[
        list[str] | None, typer.Option(help="An SAE to serve, NAME=PATH. May be given several times.")
    ] = None,
    direction: Annotated[
        list[str] | None, typer.Option(help="A direction to serve, NAME=PATH. May be given several times.")
    ] = None,
    resident: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of an --sae to keep whole on the device, which exact top-k, per-token normalisation "
            'and `error: "drop"` need. May be given several times.'
        ),
    ] = None,
    max_interventions: Annotated[
        int, typer.Option(min=1, max=64, help="The most interventions one request may carry.")
    ] = 16,
    policies: Annotated[
        Path | None,
        typer.Option(help="Folder of policies, which hold for every request; read again when it changes."),
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="File of keys, made with `steerserve keys`: who may do what.")
    ] = None,
    audit: Annotated[
        Path | None, typer.Option(help="Folder of the audit log. Requests under an enforced policy need it.")
    ] = None,
    open_to_all: Annotated[
        bool,
        typer.Option(
            "--open-to-all",
            help="Listen beyond this machine although no keys are configured: anyone may steer.",
        ),
    ] = False,
) -> None:
    """Serve MODEL over the OpenAI API with steering: `vllm serve` with the plugin.

    Every option that is not listed here goes to `vllm serve` unchanged.
    """
    ours = {
        "saes": _with_residents([_named(value, "--sae") for value in sae or []], resident or []),
        "directions": [_named(value, "--direction") for value in direction or []],
        "max_interventions": max_interventions,
        "policies": policies and str(policies.absolute()),
        "keys": keys and str(keys.absolute()),
        "audit": audit and {"folder": str(audit.absolute())},
        "open_to_all": open_to_all or None,
    }
    command, environment = serve_command(model, ours, context.args)
    os.execvpe(command[0], command, environment)


@app.command(context_settings=_PASS_ON)
def harvest(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model folder or name, as vLLM takes it.")],
    corpus: Annotated[
        Path,
        typer.Argument(
            help="Text: .txt (a text per line), .jsonl, .parquet, .arrow, or a folder of Parquet files or of "
            "`datasets.save_to_disk`. Read as a stream, of any size."
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(help="Folder for the activation shards. A harvest that was killed there goes on."),
    ],
    layer: Annotated[
        list[int],
        typer.Option(
            min=0,
            help="Decoder layer whose residual stream is kept. May be given several times: each goes to a "
            "folder of its own (OUT/resid_post.3). Layers behind the deepest are not computed.",
        ),
    ],
    hook: Annotated[str, typer.Option(help="resid_post or resid_pre of these layers.")] = "resid_post",
    field: Annotated[
        str, typer.Option(help="The key or column that holds the text, where there are such.")
    ] = "text",
    rows_per_shard: Annotated[
        int, typer.Option(min=1, help="Activations per file: the most that a kill may lose.")
    ] = 65_536,
) -> None:
    """Keep the residual stream of MODEL on a corpus, captured through vLLM at the hook that serving steers.

    Special tokens are left out. Texts longer than --max-model-len are cut into pieces. Options that are not
    listed here are vLLM engine arguments (--max-model-len 1024 --data-parallel-size 8 …).
    """
    command = [sys.executable, "-m", "steerserve_vllm.harvest_command", model, str(corpus), str(out)]
    command += [word for number in layer for word in ("--layer", str(number))]
    command += ["--hook", hook, "--field", field, "--rows-per-shard", str(rows_per_shard)]
    command += context.args
    os.execvpe(command[0], command, _environment())


app.command()(train)
app.command("eval")(eval_command)
app.command("directions")(directions_command)
app.add_typer(sae_app, name="sae")
app.add_typer(policy_app, name="policy")
app.add_typer(keys_app, name="keys")
app.add_typer(audit_app, name="audit")
app.command()(toy)
app.command()(scaling)
app.add_typer(experiment_app, name="experiment")


def serve_command(model: str, ours: dict[str, Any], rest: list[str]) -> tuple[list[str], dict[str, str]]:
    """The `vllm serve` command line and its environment.

    Args:
        ours: the `steerserve` part of the additional config.
        rest: everything for `vllm serve`; an `--additional-config` among it is merged.
    Raises: ConfigError or CheckpointError if something named cannot be served.
    """
    given, rest = _take_additional_config(rest)
    additional = {**given, "steerserve": {**given.get("steerserve", {}), **_without_empty(ours)}}
    config = parse_config(additional)
    assert config is not None
    _check_files(config)
    _check_guard(config, rest)
    command = [sys.executable, "-m", "steerserve_vllm.vllm_command", "serve", model]
    return [*command, "--additional-config", json.dumps(additional), *rest], _environment()


def main() -> None:
    """Run the command; a mistake of the user's is one line on stderr and exit code 2."""
    try:
        app()
    except SteerserveError as error:
        Console(stderr=True, soft_wrap=True).print(
            f"steerserve: {error}", style="red", highlight=False, markup=False
        )
        sys.exit(2)


def _named(value: str, option: str) -> dict[str, str]:
    name, equals, path = value.partition("=")
    if not (name and equals and path):
        raise ConfigError(f"expected {option} NAME=PATH, got {value!r}")
    return {"name": name, "path": str(Path(path).absolute())}


def _with_residents(saes: list[dict[str, str]], resident: list[str]) -> list[dict[str, Any]]:
    names = [sae["name"] for sae in saes]
    for name in resident:
        if name not in names:
            raise ConfigError(f"expected --resident to name one of the SAEs {names}, got {name!r}")
    return [{**sae, "resident": True} if sae["name"] in resident else {**sae} for sae in saes]


def _without_empty(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value not in ([], None)}


def _take_additional_config(rest: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Split `--additional-config JSON` off the arguments, in either of its spellings."""
    for i, argument in enumerate(rest):
        flag, equals, value = argument.partition("=")
        if flag not in ("--additional-config", "--additional_config"):
            continue
        width = 1 if equals else 2
        text = value if equals else "".join(rest[i + 1 : i + 2])
        try:
            given = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"expected --additional-config to be JSON: {error}") from None
        if not isinstance(given, dict):
            raise ConfigError("expected --additional-config to be a JSON object")
        return given, rest[:i] + rest[i + width :]
    return {}, rest


def _check_files(config: SteerserveConfig) -> None:
    """Open what is named before vLLM starts, which takes its time: a typo should not."""
    for sae in config.saes:
        check_served(sae.name, open_sae(sae.path), resident=sae.resident)
    for direction in config.directions:
        read_direction(direction.path)


def _check_guard(config: SteerserveConfig, rest: list[str]) -> None:
    """Read keys and policies before vLLM starts, and refuse to listen where an open server should not.

    Raises: KeyFileError, PolicyError or ConfigError.
    """
    if config.keys is not None:
        read_key_file(config.keys)
    if config.policies is not None:
        PolicyFolder(config.policies, lambda _: None)
    guarded = config.keys is not None or bool(_flag(rest, "--api-key") or os.environ.get("VLLM_API_KEY"))
    if not any(word.startswith(("-h", "--help")) for word in rest):
        host, socket = _flag(rest, "--host"), _flag(rest, "--uds")
        check_binding(host, socket, guarded=guarded, open_to_all=config.open_to_all)


def _flag(rest: list[str], name: str) -> str | None:
    """The value of one of vLLM's options, in either of its spellings."""
    for i, argument in enumerate(rest):
        flag, equals, value = argument.partition("=")
        if flag.replace("_", "-") == name:
            return value if equals else "".join(rest[i + 1 : i + 2])
    return None


def _environment() -> dict[str, str]:
    named = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    plugins = named if PLUGIN in named else [*named, PLUGIN]
    return {**os.environ, "VLLM_PLUGINS": ",".join(plugins)}
