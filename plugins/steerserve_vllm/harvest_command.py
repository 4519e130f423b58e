"""The engine side of `steerserve harvest`: vLLM's engine arguments are accepted as they are."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from steerserve.config import HarvestConfig
from steerserve.errors import ConfigError, SteerserveError
from steerserve.training.corpus import Corpus, open_corpus
from steerserve.training.part import Part

from .driver import leave_with
from .harvest import harvest
from .harvest_replicas import harvest_replicas, reporting

__all__ = ["main"]

_OWN = (
    "model_path",
    "corpus",
    "out",
    "layer",
    "hook",
    "field",
    "rows_per_shard",
    "model",
    "replica",
    "report_to",
)


def main() -> None:
    """Harvest what the command line names; a mistake of the user's is one line on stderr and exit code 2."""
    try:
        _run(*_parse())
    except SteerserveError as error:
        Console(stderr=True, soft_wrap=True).print(
            f"steerserve: {error}", style="red", highlight=False, markup=False
        )
        sys.exit(2)


def _parse() -> tuple[argparse.Namespace, dict[str, Any]]:
    """Our arguments, and those for the engine that differ from vLLM's defaults."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(description="Harvest activations through vLLM.")
    parser.add_argument("model_path")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layer", type=int, action="append", required=True)
    parser.add_argument("--hook", choices=["resid_post", "resid_pre"], default="resid_post")
    parser.add_argument("--field", default="text")
    parser.add_argument("--rows-per-shard", type=int, default=65_536)
    # How one of several data-parallel replicas is told which it is, and where to report.
    parser.add_argument("--replica", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--report-to", type=int, help=argparse.SUPPRESS)
    EngineArgs.add_cli_args(parser)
    defaults = {action.dest: action.default for action in parser._actions}
    given: argparse.Namespace = parser.parse_args()
    return given, {k: v for k, v in vars(given).items() if k not in _OWN and v != defaults.get(k)}


def _run(given: argparse.Namespace, engine: dict[str, Any]) -> None:
    layers = given.layer[0] if len(given.layer) == 1 else tuple(given.layer)
    try:
        config = HarvestConfig(layer=layers, hook=given.hook, out=given.out.absolute())
    except ValidationError as error:
        raise ConfigError(f"{error.errors(include_url=False)[0]['msg']} - at --layer") from None
    corpus = open_corpus(given.corpus, given.field)
    replicas = int(engine.pop("data_parallel_size", None) or 1)
    if replicas > 1 and given.replica is None:
        devices = int(engine.get("tensor_parallel_size", 1)) * int(engine.get("pipeline_parallel_size", 1))
        command = [sys.executable, "-m", "steerserve_vllm.harvest_command", *sys.argv[1:]]
        written = harvest_replicas(command, replicas, devices, list(config.folders.values()), corpus.size)
    else:
        written = _harvest_one(given, engine, config, corpus, Part(given.replica or 0, replicas))
    where = ", ".join(str(folder) for folder in config.folders.values())
    print(f"{where}: {written:,} activations of {given.corpus}")


def _harvest_one(
    given: argparse.Namespace, engine: dict[str, Any], config: HarvestConfig, corpus: Corpus, part: Part
) -> int:
    if given.replica is not None:
        leave_with(os.getppid())
    with reporting(given.report_to) as report:
        return harvest(
            given.model_path,
            corpus,
            config,
            rows_per_shard=given.rows_per_shard,
            resume=True,
            part=part,
            report=report,
            **engine,
        )


if __name__ == "__main__":
    main()
