"""A training run as a YAML file: the shards, where the SAEs go, and the settings of each.

shards: build/shards
out: build/saes
d_sae: 4096            # settings of all
saes:                  # and of each; one SAE needs no list
  - {name: narrow, architecture: topk, k: 16}
  - {name: wide, architecture: jumprelu, l0_target: 64}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from steerserve.errors import ConfigError

from .settings import TrainSettings, parse_settings

__all__ = ["TrainConfig", "read_config"]

_OWN = ("out", "saes", "shards", "tensorboard")


@dataclass(frozen=True)
class TrainConfig:
    """Attributes:
    shards: a harvest. saes: settings by the folder each SAE goes to. tensorboard: a folder for its events.
    """

    shards: Path
    saes: dict[Path, TrainSettings]
    tensorboard: Path | None = None

    @property
    def settings(self) -> list[TrainSettings]:
        """Of each SAE, in order."""
        return list(self.saes.values())


def read_config(source: Path, overrides: Mapping[str, Any]) -> TrainConfig:
    """A YAML file, or a folder of shards, with settings from the command line over it.

    Args: overrides: settings, and `out`, `shards` or `tensorboard`, that win over the file's.
    Raises: ConfigError naming the setting that is wrong or missing.
    """
    is_file = source.suffix in (".yaml", ".yml")
    values = {**(_read_yaml(source) if is_file else {"shards": source}), **overrides}
    own = {name: values.pop(name, None) for name in _OWN}
    if own["shards"] is None or own["out"] is None:
        missing = "shards" if own["shards"] is None else "out"
        raise ConfigError(f"expected `{missing}` in {source} or on the command line, found none")
    out = Path(own["out"])
    board = Path(own["tensorboard"]) if own["tensorboard"] else None
    return TrainConfig(Path(own["shards"]), _saes(own["saes"], values, out, source), board)


def _saes(given: object, common: dict[str, Any], out: Path, source: Path) -> dict[Path, TrainSettings]:
    if given is None:
        return {out: parse_settings(common)}
    if not isinstance(given, list) or not given or not all(isinstance(one, dict) for one in given):
        raise ConfigError(f"expected `saes` to be a list of settings in {source}, got {given!r}")
    found: dict[Path, TrainSettings] = {}
    for one in given:
        rest = dict(one)
        name = rest.pop("name", None)
        if not isinstance(name, str) or not name or "/" in name or name.startswith("."):
            raise ConfigError(f"expected a `name` for each of `saes` in {source}, got {name!r}")
        if out / name in found:
            raise ConfigError(f"expected different names in `saes` of {source}, got {name!r} twice")
        found[out / name] = parse_settings({**common, **rest})
    return found


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"expected a config to read at {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"expected valid YAML in {path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"expected settings by name in {path}, got {type(values).__name__}")
    return values
