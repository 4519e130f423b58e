"""One real server for the whole folder: a tiny random Llama, an SAE made by SAELens, and a direction."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI

from steerserve.sae import Direction, Hook, Label, Manifest, write_direction, write_manifest
from steerserve.sae.manifest import HookEntry, ModelEntry
from tests.support import fork_server
from tests.support.fork_server import Command
from tests.support.models import D_MODEL, make_model
from tests.support.one import OneAtATime
from tests.support.saes import D_SAE, make_sae
from tests.support.times import starting

KEY = "let-me-in"
LAYER = 1
# Far beyond what the tiny model was made for, so that a long reply takes seconds.
MAX_LENGTH = 4096
START_SECONDS = 240
# `vllm serve` asks for a distribution named "vllm", which the CPU build is not.
VLLM_SERVE = ["-m", "vllm.entrypoints.launchers.api_server.entry"]


@dataclass(frozen=True)
class Server:
    """A running server. `http` and `openai` are clients that hold its key."""

    url: str
    log: Path
    process: Command
    http: httpx.Client
    openai: OpenAI

    def post(self, path: str, body: Any, **kwargs: Any) -> httpx.Response:
        return self.http.post(path, json=body, **kwargs)

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics, by name and labels as they are written there."""
        lines = self.http.get("/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels; 0 where there are none."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        samples = self.metrics().items()
        return sum(
            value
            for key, value in samples
            if re.split(r"[{ ]", key)[0] == name and all(label in key for label in wanted)
        )

    def eventually(self, holds: Callable[[], bool], seconds: float = 30) -> bool:
        """Whether it holds before the time is over."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if holds():
                return True
            time.sleep(0.25)
        return False


@pytest.fixture(scope="module")
def server(running: OneAtATime, tmp_path_factory: pytest.TempPathFactory) -> Server:
    def start() -> AbstractContextManager[Server]:
        folder, port = tmp_path_factory.mktemp("server"), free_port()
        return serve(_command(folder, port), port, KEY, folder / "log", environment())

    return running.get("server", start)


@contextmanager
def serve(
    command: list[str], port: int, key: str, log: Path, environment: dict[str, str]
) -> Iterator[Server]:
    """Start a server by a command line of Python, wait until it answers, and end it."""
    url = f"http://127.0.0.1:{port}"
    with starting():
        with log.open("wb") as out:
            process = fork_server.command(*command, stdout=out, stderr=out, env=environment)
        http = httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=120)
        try:
            _wait(http, process, log)
        except BaseException:
            _stop(process)
            raise
    try:
        with closing(http), OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120) as openai:
            yield Server(url, log, process, http, openai)
    finally:
        _stop(process)


@pytest.fixture(autouse=True)
def _log_on_failure(server: Server, request: pytest.FixtureRequest) -> Iterator[None]:
    failed = request.session.testsfailed
    alive = server.process.poll() is None
    yield
    if request.session.testsfailed > failed or not alive:
        print(tail(server.log))
    assert server.process.poll() is None, "the server died:\n" + tail(server.log)


def _command(folder: Path, port: int) -> list[str]:
    model = make_model(folder / "model", "llama", never_special=True)
    # Rotary positions need no weights; a server that is told to go beyond them reads what lies behind.
    config_file = model / "config.json"
    written = json.loads(config_file.read_text(encoding="utf-8"))
    written["max_position_embeddings"] = MAX_LENGTH
    config_file.write_text(json.dumps(written), encoding="utf-8")
    config = {"saes": [{"name": "demo", "path": str(labelled_sae(folder / "sae"))}]}
    config["directions"] = [{"name": "french", "path": str(direction(folder / "french.safetensors"))}]
    flags = {
        "model": str(model),
        "served-model-name": "tiny",
        "host": "127.0.0.1",
        "port": str(port),
        "api-key": KEY,
        "dtype": "float32",
        "max-model-len": str(MAX_LENGTH),
        "max-num-seqs": "32",
        "additional-config": json.dumps({"steerserve": config}),
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    return [*VLLM_SERVE, *words, "--enforce-eager", "--enable-scale-out"]


def labelled_sae(folder: Path) -> Path:
    make_sae(folder, "jumprelu", LAYER)
    names = ["cfg.json", "sae_weights.safetensors"]
    files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    manifest = Manifest(
        model=ModelEntry(name="tiny"),
        hook=HookEntry(layer=LAYER, site="resid_post"),
        d_in=D_MODEL,
        d_sae=D_SAE,
        architecture="jumprelu",
        files=files,
        labels=[Label(feature=7, label="legal", domain="law", f1=0.9), Label(feature=9, label="food")],
    )
    write_manifest(folder, manifest)
    return folder


def direction(path: Path) -> Path:
    vector = torch.nn.functional.normalize(torch.ones(D_MODEL), dim=0)
    write_direction(path, Direction("french", vector, Hook(LAYER, "resid_post")))
    return path


def environment() -> dict[str, str]:
    """What every server here is started with."""
    return os.environ | {
        "VLLM_PLUGINS": "steerserve",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        # A busy machine must not have idle connections closed under a client that is about to use them.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "300",
    }


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _wait(http: httpx.Client, process: Command, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail("the server did not start:\n" + tail(log), pytrace=False)
        try:
            if http.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    pytest.fail(f"no server within {START_SECONDS} s:\n" + tail(log), pytrace=False)


def _stop(process: Command) -> None:
    """End the process group that was started here, by its id."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
            process.wait(timeout=20)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def tail(log: Path) -> str:
    """The end of the log without the lines that say that all is well."""
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(line for line in lines if " INFO " not in line and "INFO: " not in line)[-8000:]
