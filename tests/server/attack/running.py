"""The server that is attacked: policies, keys, audit, two SAEs under three names, a look into its worker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerserve.access.key_entry import new_entry
from steerserve.access.key_file import change_key_file
from steerserve.access.key_text import new_key_text
from steerserve.access.limits import Limits
from steerserve.access.principal import SCOPES, ScopeName
from tests.server import conftest as plain
from tests.server.conftest import Server
from tests.support.models import make_model
from tests.support.saes import make_sae

__all__ = ["HELD", "LAYER", "Attacked", "start"]

ROOT = Path(__file__).parents[3]
LAYER = plain.LAYER
# Of `demo` and its twin. 7 is labelled "legal".
HELD = (7, 11, 20, 33, 64, 101)
MAX_LENGTH = 512

_NARROW = Limits(features={"demo": ((0, 16),)}, ops=("clamp", "ablate"), max_value=8.0, max_interventions=2)
_KEYS: dict[str, tuple[tuple[ScopeName, ...], Limits]] = {
    "all": (SCOPES, Limits()),
    **{scope: ((scope,), Limits()) for scope in SCOPES},
    "user": (("infer", "steer"), Limits()),
    "narrow": (("infer", "steer"), _NARROW),
}
_EVERYWHERE = {"special_tokens": True}


@dataclass
class Attacked:
    """A running server, its folders, and the text of each of its keys. `server.http` holds the key `all`."""

    server: Server
    keys: dict[str, str]
    policies: Path
    audit: Path
    sae: Path
    killed: bool = False

    def head(self, key: str | None) -> dict[str, str]:
        """The header that brings a key; none for None."""
        return {} if key is None else {"authorization": f"Bearer {self.keys[key]}"}

    def rpc(self, method: str, *args: Any) -> Any:
        """What the one worker answers."""
        reply = self.server.post("/collective_rpc", {"method": method, "args": args})
        assert reply.status_code == 200, reply.text
        return reply.json()["results"][0]

    def observe(self) -> None:
        """Begin to watch the held features of `demo` in the stream behind its layer, anew."""
        self.rpc("attack_observe", str(self.sae), list(HELD), LAYER)


def policy(name: str, version: int = 1, mode: str = "enforce", **fields: Any) -> str:
    """A document; JSON is YAML."""
    said = {
        "name": name,
        "version": version,
        "mode": mode,
        "owner": "safety@example.org",
        "reason": "A test.",
    }
    return json.dumps({**said, **fields})


@contextmanager
def start(folder: Path, *options: str) -> Iterator[Attacked]:
    """Start the server, and end it. Args: options: further words of its command line."""
    folders = {name: folder / name for name in ("policies", "audit")}
    for path in folders.values():
        path.mkdir()
    _write_policies(folders["policies"])
    keys = _write_keys(folder / "keys.yaml")
    port = plain.free_port()
    command = [*_command(folder, port), *options]
    with plain.serve(command, port, keys["all"], folder / "log", _environment()) as server:
        yield Attacked(server, keys, **folders, sae=folder / "sae")


def _write_policies(folder: Path) -> None:
    held = [{"sae": "demo", "feature": n, "op": "ablate", "where": _EVERYWHERE} for n in HELD]
    watch = [{"name": "food", "sae": "demo", "feature": "food", "above": 0.5}]
    documents = {
        "hold": policy("hold", interventions=held),
        "churn": policy("churn", interventions=[{"sae": "late", "feature": 3, "op": "at_most", "value": 1}]),
        "look": policy("look", mode="shadow", watch=watch),
    }
    for name, text in documents.items():
        (folder / f"{name}.yaml").write_text(text)


def _write_keys(path: Path) -> dict[str, str]:
    texts = {name: new_key_text() for name in _KEYS}
    entries = [new_entry(texts[name], name, scopes, limits) for name, (scopes, limits) in _KEYS.items()]
    change_key_file(path, lambda _: entries, create=True)
    return {name: str(text) for name, text in texts.items()}


def _command(folder: Path, port: int) -> list[str]:
    model = make_model(folder / "model", "llama", never_special=True)
    sae = str(plain.labelled_sae(folder / "sae"))
    late = str(make_sae(folder / "late", "standard", LAYER + 1, seed=1))
    config = {
        "saes": [
            {"name": "demo", "path": sae, "resident": True},
            {"name": "twin", "path": sae},
            {"name": "late", "path": late},
        ],
        "directions": [{"name": "french", "path": str(plain.direction(folder / "french.safetensors"))}],
        "policies": str(folder / "policies"),
        "keys": str(folder / "keys.yaml"),
        "audit": {"folder": str(folder / "audit")},
    }
    flags = {
        "served-model-name": "tiny",
        "host": "127.0.0.1",
        "port": str(port),
        "dtype": "bfloat16",
        "max-model-len": str(MAX_LENGTH),
        "max-num-seqs": "32",
        "worker-extension-cls": "tests.support.observer.Observer",
        "middleware": "tests.server.attack.route_list.answer",
        "additional-config": json.dumps({"steerserve": config}),
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    serve = ["-m", "steerserve_vllm.vllm_command", "serve", str(model)]
    return [*serve, *words, "--enforce-eager", "--enable-scale-out", "--enable-request-id-headers"]


def _environment() -> dict[str, str]:
    return plain.environment() | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        # For /collective_rpc, which reads what the worker saw, and for the routes that come with it.
        "VLLM_SERVER_DEV_MODE": "1",
        # Without it no reply can be asked for in the background.
        "VLLM_ENABLE_RESPONSES_API_STORE": "1",
    }
