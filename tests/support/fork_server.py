"""Runs Python's command lines in forks of a process that has imported vLLM: `command(...)` is a `Popen`.

The server is a process of its own, started once a session, in which nothing else happens: what it forks is as
clean as a new interpreter that has run these imports.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, NoReturn

__all__ = ["Command", "Done", "command", "run", "start"]

ROOT = Path(__file__).parents[2]


class Command:
    """A running command line. As of `subprocess.Popen`: `pid`, `returncode`, `poll`, `wait`, `kill`.

    It leads a session of its own. Args: channel: brings its process id, and its exit status as it ends.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._lines = channel.makefile("r")
        self.pid = int(self._lines.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, minus the signal's number where a signal ended it.

        Raises: subprocess.TimeoutExpired.
        """
        if self.returncode is None:
            self._channel.settimeout(timeout)
            try:
                self.returncode = int(self._channel.recv(16) or b"-9")
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0) from None
            self._lines.close()
            self._channel.close()
        return self.returncode

    def kill(self) -> None:
        """End it at once, and nothing that it started."""
        os.kill(self.pid, signal.SIGKILL)


class Done:
    """A command that ended, and what it wrote."""

    def __init__(self, returncode: int, stdout: str, stderr: str) -> None:
        self.returncode, self.stdout, self.stderr = returncode, stdout, stderr


def command(
    *words: str,
    stdout: IO[bytes],
    stderr: IO[bytes],
    stdin: IO[bytes] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Command:
    """Start `python` with these words, `-m MODULE …` or `-c CODE …`."""
    ours, theirs = socket.socketpair()
    with theirs, open(os.devnull, "rb") as nothing:
        files = [theirs, stdin or nothing, stdout, stderr]
        socket.send_fds(start(), [b"x"], [file.fileno() for file in files])
    asked = {"words": words, "env": dict(os.environ if env is None else env), "cwd": str(cwd or Path.cwd())}
    ours.sendall(json.dumps(asked).encode() + b"\n")
    return Command(ours)


def run(*words: str, folder: Path, stdin: str = "", timeout: float, **options: Any) -> Done:
    """Run `python` with these words to its end. Args: folder: where its output is kept meanwhile."""
    paths = [folder / name for name in ("stdin", "stdout", "stderr")]
    paths[0].write_text(stdin)
    with paths[0].open("rb") as source, paths[1].open("wb") as out, paths[2].open("wb") as err:
        running = command(*words, stdin=source, stdout=out, stderr=err, **options)
    try:
        code = running.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        raise
    return Done(code, *(path.read_text(errors="replace") for path in paths[1:]))


@cache
def start() -> socket.socket:
    """Start the fork server, which imports in the background. Returns: the socket on which it is asked."""
    ours, theirs = socket.socketpair()
    with theirs:
        # One thread: what a fork finds of OpenMP's pool are its locks, and none of its threads.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fork_server", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )

    def stop() -> None:
        ours.close()
        server.wait()

    atexit.register(stop)
    return ours


def _serve(control: socket.socket) -> None:
    """Fork a supervisor for each command that is asked for, until nobody can ask any more."""
    import tests.support.preloaded  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        _, files, *_ = socket.recv_fds(control, 1, 4)
        if not files:
            return
        if os.fork() == 0:
            control.close()
            _supervise(socket.socket(fileno=files[0]), files[1:])
        for file in files:
            os.close(file)


def _supervise(channel: socket.socket, files: list[int]) -> NoReturn:
    """Fork the command; the parent says its process id and its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with channel.makefile("r") as lines:
        asked = json.loads(lines.readline())
    pid = os.fork()
    if pid == 0:
        channel.close()
        _become(asked, files)
    for file in files:
        os.close(file)
    channel.sendall(f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    with suppress(BrokenPipeError):  # where whoever asked is gone
        channel.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _become(asked: dict[str, Any], files: list[int]) -> NoReturn:
    """Be a new interpreter with these words; what is raised ends it as it ends any."""
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.path[:0] = ["", *asked["env"].get("PYTHONPATH", "").split(os.pathsep)]
    code = 1
    try:
        _execute(*asked["words"])
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        # What an interpreter does as it ends, but for the taking down of every module, which takes seconds.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _execute(flag: str, what: str, *words: str) -> None:
    if flag == "-m":
        sys.argv = [what, *words]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [flag, *words]
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(what, "<string>", "exec"), vars(main))


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
