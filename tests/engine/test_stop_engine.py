"""An engine that is stopped: vLLM's own client, with no engine behind it."""

from __future__ import annotations

import weakref
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from vllm.v1.engine.core_client import BackgroundResources, MPClient, SyncMPClient
from vllm.v1.serial_utils import MsgpackDecoder

from steerserve_vllm.harvester import stop_engine


def begin_without_engine(self: Any, *_: Any, **options: Any) -> None:
    """`MPClient.__init__` up to where it starts an engine, and with nothing of what it hears from one."""
    self.vllm_config = options["vllm_config"]
    self.ctx = zmq.Context(io_threads=2)
    self.resources = BackgroundResources(ctx=self.ctx)
    self._finalizer = weakref.finalize(self, self.resources)
    self.resources.output_socket = self.ctx.socket(zmq.PULL)
    self.resources.output_socket.bind("inproc://outputs")
    self.decoder = MsgpackDecoder()
    self.utility_results = {}


@pytest.mark.timeout(120)
def test_its_sockets_are_closed_only_once_their_thread_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread is told to end, and is slow: it goes on only when somebody waits for it, or has given up."""
    go_on, seen = Event(), []
    polled, joined, destroyed = zmq.Poller.poll, Thread.join, zmq.Context.destroy

    def poll(poller: zmq.Poller, *args: Any) -> Any:
        found = polled(poller, *args)
        go_on.wait()
        return found

    def join(thread: Thread, timeout: float | None = None) -> None:
        go_on.set()
        joined(thread, timeout)

    def destroy(context: zmq.Context[Any], linger: int | None = None) -> None:
        seen.append(client.output_queue_thread.is_alive())
        go_on.set()
        # Whatever was seen: closed under the thread, the sockets would end this whole process.
        joined(client.output_queue_thread)
        destroyed(context, linger)

    monkeypatch.setattr(MPClient, "__init__", begin_without_engine)
    monkeypatch.setattr(zmq.Poller, "poll", poll)
    monkeypatch.setattr(zmq.Context, "destroy", destroy)
    config: Any = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1))
    client = SyncMPClient(vllm_config=config, executor_class=None, log_stats=False)  # type: ignore[arg-type]
    monkeypatch.setattr(
        client.output_queue_thread, "join", lambda timeout=None: join(client.output_queue_thread)
    )
    stop_engine(SimpleNamespace(llm_engine=SimpleNamespace(engine_core=client)))  # type: ignore[arg-type]
    assert seen == [False]
    assert client.ctx.closed
