"""The demo's server as a process of its own: `steerserve serve` on a free port, until the end of a `with`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

from demo.steer import MAX_INTERVENTIONS, prepare_environment

__all__ = ["DemoServer", "ServerDied"]

MODEL = "demo"
START_SECONDS = 300
STOP_SECONDS = 20
FLAGS = {
    "--served-model-name": MODEL,
    "--host": "127.0.0.1",
    "--max-model-len": "512",
    "--max-num-seqs": "32",
}


class ServerDied(RuntimeError):
    """The server ended, or did not answer in time; the message ends with its log."""


class DemoServer:
    """The demo model and its SAE over HTTP.

    Attributes: url: of the server, without a path. log: the file that its output goes to.
    """

    def __init__(self, demo: Path = Path("sae_weights/demo")) -> None:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = Path(tempfile.mkdtemp(prefix="steerserve-demo-")) / "server.log"
        prepare_environment()
        command = [sys.executable, "-c", "from steerserve.cli import main; main()", "serve"]
        command += [str(demo / "model"), "--sae", f"demo={demo / 'sae'}"]
        command += ["--max-interventions", str(MAX_INTERVENTIONS)]
        command += [word for pair in FLAGS.items() for word in pair]
        command += ["--port", str(port), "--enforce-eager"]
        with self.log.open("wb") as out:
            # A session of its own, so that the whole group can be ended by its id.
            self._process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)

    def __enter__(self) -> DemoServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        self.stop()

    def wait(self) -> None:
        """Return when the server answers.

        Raises: ServerDied if it ends before that, or takes longer than five minutes.
        """
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None:
                raise ServerDied(f"the server ended with code {self._process.returncode}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise ServerDied(f"the server did not answer within {START_SECONDS} s:\n{self.tail()}")
            time.sleep(0.3)

    def tail(self, characters: int = 4000) -> str:
        """The end of the server's log."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-characters:]

    def stop(self) -> None:
        """End the server and every process that it started."""
        for kind in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, kind)
                self._process.wait(timeout=STOP_SECONDS)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
