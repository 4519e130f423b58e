from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from steerserve.audit import AuditLog, Head, Record, verify
from steerserve.audit import writer as writer_module
from steerserve.audit.files import PRIVATE_KEY, PUBLIC_KEY
from steerserve.audit.signing import make_key, public_path
from steerserve.errors import AuditError, ConfigError


def request(number: int = 0) -> Record:
    return Record(event="request", request_id=f"request-{number}", outcome="ok", tokens=number)


def documents(folder: Path, prefix: str = "audit") -> list[dict[str, Any]]:
    files = sorted(folder.glob(f"{prefix}-*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_bytes().splitlines()]


def events(folder: Path) -> list[str]:
    return [document["event"] for document in documents(folder)]


def sample(name: str, log: str) -> float:
    return REGISTRY.get_sample_value(f"steerserve_audit_{name}", {"log": log}) or 0.0


@pytest.fixture
def log(tmp_path: Path) -> Iterator[AuditLog]:
    """An open log, of which no head comes by itself."""
    log = AuditLog(tmp_path, fsync="never", head_seconds=1000)
    yield log
    log.close()


class Disk:
    """Stands in for `os.write`: lets `room` bytes into files of lines, at most `step` at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: float = float("inf")
        self.step = 1 << 30
        self._write = os.write
        monkeypatch.setattr(os, "write", self)

    def __call__(self, descriptor: int, content: bytes) -> int:
        if not os.readlink(f"/proc/self/fd/{descriptor}").endswith(".jsonl"):
            return self._write(descriptor, content)
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        size = int(min(len(content), self.room, self.step))
        self.room -= size
        return self._write(descriptor, content[:size])


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_what_is_appended_stands_in_the_log_in_order(tmp_path: Path, log: AuditLog) -> None:
    places = [log.append(request(number)) for number in range(10)]
    assert [place.result().seq for place in places] == list(range(2, 12))
    assert log.head == places[-1].result()
    log.close()
    assert events(tmp_path) == ["start", *["request"] * 10, "stop", "head"]
    assert [document["tokens"] for document in documents(tmp_path)[1:11]] == list(range(10))
    assert verify(tmp_path).ok


def test_a_log_goes_on_where_it_ended(tmp_path: Path) -> None:
    for _ in range(5):
        log = AuditLog(tmp_path, fsync="never", max_bytes=3000)
        log.append(request()).result()
        log.close()
    assert events(tmp_path) == ["start", "request", "stop", "head"] * 5
    assert len(list(tmp_path.glob("audit-*.jsonl"))) > 1
    assert verify(tmp_path).ok


def test_a_coroutine_can_wait_until_it_is_written(tmp_path: Path, log: AuditLog) -> None:
    async def many() -> list[Head]:
        return await asyncio.gather(*(log.written(request(number)) for number in range(100)))

    heads = asyncio.run(many())
    assert sorted(head.seq for head in heads) == list(range(2, 102))


def test_a_record_is_written_though_nobody_waits_any_more(tmp_path: Path, log: AuditLog) -> None:
    async def leave() -> None:
        task = asyncio.create_task(log.written(request(7)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    log.close()
    assert [document["tokens"] for document in documents(tmp_path) if document["event"] == "request"] == [7]


def test_eight_threads_keep_the_chain(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, fsync="never", max_bytes=100_000, head_lines=50)
    places: list[Future[Head]] = []

    def work() -> None:
        places.extend(log.append(request(number)) for number in range(250))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({place.result().seq for place in places}) == 2000
    log.close()
    verdict = verify(tmp_path)
    assert verdict.ok
    assert verdict.chains[0].files > 1
    assert sum(event == "request" for event in events(tmp_path)) == 2000


def test_appending_never_waits_for_the_disk(
    log: AuditLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, write = threading.Event(), os.write

    def wait_and_write(descriptor: int, content: bytes) -> int:
        opened.wait()
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", wait_and_write)
    monkeypatch.setattr(writer_module, "MAX_WAITING", 50)
    places = [log.append(request(number)) for number in range(2000)]
    refused = [place for place in places if place.done()]
    assert 0 < len(refused) < 2000
    with pytest.raises(AuditError, match="expected the disk to keep up, 50 records wait"):
        refused[-1].result()
    opened.set()
    assert all(place.result() for place in places if place not in refused)
    log.close()
    assert verify(tmp_path).ok


def test_a_head_is_signed_after_so_many_lines(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, fsync="never", head_lines=4, head_seconds=1000)
    for number in range(9):
        log.append(request(number)).result()
    log.close()
    heads = [i for i, event in enumerate(events(tmp_path)) if event == "head"]
    assert heads == [4, 9, 13]


def test_a_head_is_signed_after_so_long_where_there_is_news(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, fsync="never", head_seconds=0.01)
    while "head" not in events(tmp_path):
        threading.Event().wait(0.005)
    threading.Event().wait(0.1)
    before_close = events(tmp_path)
    log.close()
    assert before_close == ["start", "head"], "without news one head is enough"


def test_a_file_ends_before_it_grows_too_large(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, fsync="never", max_bytes=5000)
    for number in range(50):
        log.append(request(number)).result()
    log.close()
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("audit-*.jsonl"))]
    assert len(sizes) > 3
    assert all(3000 < size <= 5000 for size in sizes[:-1])


def test_a_file_ends_with_the_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    day = "2026-01-31"
    monkeypatch.setattr(writer_module, "utc_now", lambda: f"{day}T23:59:59.000000Z")
    log = AuditLog(tmp_path, fsync="never")
    log.append(request()).result()
    day = "2026-02-01"
    log.append(request()).result()
    log.close()
    assert sorted(path.name for path in tmp_path.glob("audit-*.jsonl")) == [
        "audit-000001.jsonl",
        "audit-000002.jsonl",
    ]
    assert verify(tmp_path).ok


def test_a_full_disk_fails_the_record_and_leaves_no_half_line(
    tmp_path: Path, log: AuditLog, disk: Disk
) -> None:
    before = (tmp_path / "audit-000001.jsonl").read_bytes()
    failed = sample("failures_total", "audit")
    for room in (0, 1, 100, 300):
        disk.room = room
        with pytest.raises(AuditError, match=r"expected to write to .*audit-000001.jsonl: .*No space left"):
            log.append(request()).result()
        assert not log.healthy
        assert "No space left" in str(log.problem)
        assert (tmp_path / "audit-000001.jsonl").read_bytes() == before
    assert sample("failures_total", "audit") == failed + 4
    assert sample("healthy", "audit") == 0
    disk.room = float("inf")
    assert log.append(request(9)).result().seq == 2
    log.close()
    assert log.healthy
    assert sample("healthy", "audit") == 1
    assert events(tmp_path) == ["start", "request", "stop", "head"]
    assert verify(tmp_path).ok


def test_what_cannot_be_taken_back_at_once_is_taken_back_before_the_next_line(
    tmp_path: Path, log: AuditLog, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, size: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = (tmp_path / "audit-000001.jsonl").stat().st_size
    disk.room = 100
    with monkeypatch.context() as patched:
        patched.setattr(os, "ftruncate", refuse)
        with pytest.raises(AuditError):
            log.append(request()).result()
        assert (tmp_path / "audit-000001.jsonl").stat().st_size == before + 100
    disk.room = float("inf")
    log.append(request()).result()
    log.close()
    assert verify(tmp_path).ok


def test_short_writes_are_gone_on_with(tmp_path: Path, log: AuditLog, disk: Disk) -> None:
    disk.step = 7
    for number in range(5):
        log.append(request(number)).result()
    disk.step = 1 << 30
    log.close()
    assert verify(tmp_path).ok


def test_a_failing_sync_fails_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(tmp_path, fsync="batch")

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        with pytest.raises(AuditError, match="Input/output error"):
            log.append(request()).result()
    log.append(request()).result()
    log.close()
    assert events(tmp_path).count("request") == 1
    assert verify(tmp_path).ok


def test_the_writer_tries_a_full_disk_again_by_itself(tmp_path: Path, disk: Disk) -> None:
    log = AuditLog(tmp_path, fsync="never", head_seconds=0.01)
    disk.room = 0
    with pytest.raises(AuditError):
        log.append(request()).result()
    disk.room = float("inf")
    while not log.healthy:
        threading.Event().wait(0.005)
    log.close()
    assert verify(tmp_path).ok


def test_a_head_file_that_cannot_be_replaced_is_a_problem_though_the_record_is_written(
    tmp_path: Path, log: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(writer_module, "write_head_file", refuse)
        assert log.append(request()).result().seq == 2
        while log.healthy:
            threading.Event().wait(0.005)
    log.append(request()).result()
    log.close()
    assert log.healthy
    assert verify(tmp_path).ok


@pytest.mark.parametrize("harm", ["delete", "replace", "cut", "add"])
def test_a_file_that_is_changed_under_the_writer_takes_no_more_lines(
    tmp_path: Path, log: AuditLog, harm: str
) -> None:
    path = tmp_path / "audit-000001.jsonl"
    content = path.read_bytes()
    if harm in ("delete", "replace"):
        path.unlink()
    if harm != "delete":
        path.write_bytes({"replace": content, "cut": content[:-1], "add": content + b"\n"}[harm])
    with pytest.raises(AuditError, match=r"audit-000001\.jsonl"):
        log.append(request()).result()
    assert not log.healthy


def test_a_second_writer_is_refused(tmp_path: Path, log: AuditLog) -> None:
    with pytest.raises(AuditError, match=r"expected no other writer of .*audit, there is one: give each"):
        AuditLog(tmp_path)
    AuditLog(tmp_path, "other", fsync="never").close()
    log.close()
    AuditLog(tmp_path, fsync="never").close()
    assert verify(tmp_path).ok


def test_a_refused_start_leaves_the_lock(tmp_path: Path) -> None:
    AuditLog(tmp_path).close()
    head = tmp_path / "audit.head.json"
    content = head.read_bytes()
    head.unlink()
    with pytest.raises(AuditError, match="file missing"):
        AuditLog(tmp_path)
    head.write_bytes(content)
    AuditLog(tmp_path).close()


def test_a_half_line_is_dropped_and_said_so(tmp_path: Path) -> None:
    AuditLog(tmp_path, fsync="never").close()
    with (tmp_path / "audit-000001.jsonl").open("ab") as stream:
        stream.write(b'{"detail":"","event":"requ')
    AuditLog(tmp_path, fsync="never").close()
    assert documents(tmp_path)[3]["detail"] == "dropped the 26 bytes of a half-written line"
    assert verify(tmp_path).ok


def test_lines_that_no_head_had_signed_are_said_so(tmp_path: Path) -> None:
    AuditLog(tmp_path, fsync="never").close()
    content = (tmp_path / "audit.head.json").read_bytes()
    AuditLog(tmp_path, fsync="never").close()
    (tmp_path / "audit.head.json").write_bytes(content)
    AuditLog(tmp_path, fsync="never").close()
    starts = [document["detail"] for document in documents(tmp_path) if document["event"] == "start"]
    assert starts == ["", "", "went on behind 3 lines that no head had signed"]
    assert verify(tmp_path).ok


def test_an_empty_file_that_a_crash_left_is_gone_on_with(tmp_path: Path) -> None:
    AuditLog(tmp_path, fsync="never").close()
    (tmp_path / "audit-000002.jsonl").touch()
    assert verify(tmp_path).ok
    AuditLog(tmp_path, fsync="never").close()
    assert (tmp_path / "audit-000002.jsonl").stat().st_size > 0
    assert verify(tmp_path).ok


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda content: content[:-1], "truncated"),
        (lambda content: content[: content.rindex(b"\n", 0, -1) + 1], "truncated"),
        (lambda content: content.replace(b'"stop"', b'"keys"'), "edited"),
        (lambda content: content.replace(b'"start"', b'"keys"'), "edited"),
        (lambda content: b"", "truncated"),
        (lambda content: content + b"no JSON\n", "not JSON"),
    ],
)
def test_a_log_whose_end_was_changed_is_not_gone_on_with(
    tmp_path: Path, harm: Callable[[bytes], bytes], told: str
) -> None:
    AuditLog(tmp_path, fsync="never").close()
    path = tmp_path / "audit-000001.jsonl"
    path.write_bytes(harm(path.read_bytes()))
    harmed = path.read_bytes()
    with pytest.raises(AuditError, match=rf"audit-000001.jsonl:\d: {told}: .* \(keep the folder as evidence"):
        AuditLog(tmp_path)
    assert path.read_bytes() == harmed


def test_a_log_that_lost_a_file_is_not_gone_on_with(tmp_path: Path, written: Path) -> None:
    for name in ("audit-000001.jsonl", sorted(written.glob("audit-*.jsonl"))[-1].name):
        folder = tmp_path / name
        folder.mkdir()
        for path in written.iterdir():
            if path.name != name:
                (folder / path.name).write_bytes(path.read_bytes())
        with pytest.raises(AuditError, match=f"{name}: file missing"):
            AuditLog(folder)


def test_a_key_from_elsewhere_signs_and_only_its_public_half_lies_beside(tmp_path: Path) -> None:
    make_key(tmp_path / "kept.pem")
    AuditLog(tmp_path / "log", key=tmp_path / "kept.pem").close()
    assert verify(tmp_path / "log", public_path(tmp_path / "kept.pem")).ok
    assert (tmp_path / "log" / PUBLIC_KEY).exists()
    assert not (tmp_path / "log" / PRIVATE_KEY).exists()


def test_a_log_keeps_its_key(tmp_path: Path) -> None:
    AuditLog(tmp_path / "log").close()
    make_key(tmp_path / "other.pem")
    with pytest.raises(AuditError, match="a log keeps one signing key; begin a new folder"):
        AuditLog(tmp_path / "log", key=tmp_path / "other.pem")


def test_a_log_that_lost_its_private_key_is_not_gone_on_with(tmp_path: Path) -> None:
    AuditLog(tmp_path).close()
    (tmp_path / PRIVATE_KEY).unlink()
    for _ in range(2):
        with pytest.raises(AuditError, match=rf"expected no file at .*{PUBLIC_KEY}"):
            AuditLog(tmp_path)


def test_a_key_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "bad.pem").write_text("hello")
    make_key(tmp_path / "good.pem")
    for name in ("bad.pem", "missing.pem", "good.pub.pem"):
        with pytest.raises(AuditError, match=f"expected an Ed25519 private key in PEM.* at .*{name}"):
            AuditLog(tmp_path / "log", key=tmp_path / name)


def test_a_folder_that_cannot_be_made_and_a_prefix_that_is_none_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AuditError, match="expected to write an audit log to"):
        AuditLog(tmp_path / "file" / "log")
    with pytest.raises(ConfigError, match="expected a prefix"):
        AuditLog(tmp_path, "../audit")


def test_a_disk_that_is_full_from_the_start_refuses_the_start(tmp_path: Path, disk: Disk) -> None:
    AuditLog(tmp_path, fsync="never").close()
    disk.room = 0
    with pytest.raises(AuditError, match="No space left"):
        AuditLog(tmp_path)
    disk.room = float("inf")
    AuditLog(tmp_path, fsync="never").close()
    assert verify(tmp_path).ok


def test_a_closed_log_takes_no_more(tmp_path: Path, log: AuditLog) -> None:
    log.close()
    log.close()
    with pytest.raises(AuditError, match="it was closed"):
        log.append(request()).result()


def test_the_file_and_key_are_not_everyones(tmp_path: Path, log: AuditLog) -> None:
    assert (tmp_path / "audit-000001.jsonl").stat().st_mode & 0o007 == 0
    assert (tmp_path / PRIVATE_KEY).stat().st_mode & 0o777 == 0o600


def test_records_and_writes_are_counted(tmp_path: Path) -> None:
    lines, writes = sample("lines_total", "counted"), sample("write_seconds_count", "counted")
    log = AuditLog(tmp_path, "counted", fsync="never")
    log.append(request()).result()
    log.close()
    assert sample("lines_total", "counted") == lines + 3
    assert sample("write_seconds_count", "counted") == writes + 3
    assert sample("healthy", "counted") == 1


CHILD = """
import sys, threading
from pathlib import Path
from steerserve.audit import AuditLog, Record

log = AuditLog(Path(sys.argv[1]), fsync=sys.argv[2], max_bytes=60_000, head_lines=20, head_seconds=0.01)

def work(worker):
    number = 0
    while True:
        head = log.append(Record(event="request", principal=f"w{worker}", tokens=number)).result()
        sys.stdout.write(f"{head.seq} {worker} {number}\\n")
        sys.stdout.flush()
        number += 1

for worker in range(4):
    threading.Thread(target=work, args=(worker,)).start()
"""


@pytest.mark.parametrize("fsync", ["never", "batch"])
def test_what_was_acknowledged_survives_kill_9(tmp_path: Path, fsync: str) -> None:
    acknowledged: list[tuple[int, str, int]] = []
    for lines in (1, 50, 200, 333):
        command = [sys.executable, "-c", CHILD, str(tmp_path), fsync]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            said = [child.stdout.readline() for _ in range(lines)]
            child.send_signal(signal.SIGKILL)
            said += [line for line in child.stdout if line.endswith("\n")]
        for seq, worker, number in map(str.split, said):
            acknowledged.append((int(seq), f"w{worker}", int(number)))
        assert verify(tmp_path).ok
    requests = [item for item in documents(tmp_path) if item["event"] == "request"]
    found = {(item["seq"], item["principal"], item["tokens"]) for item in requests}
    assert len(acknowledged) >= 584
    assert set(acknowledged) <= found


ENDING = """
import sys
from pathlib import Path
from steerserve.audit import AuditLog, Record
log = AuditLog(Path(sys.argv[1]))
log.append(Record(event="keys"))
"""


def test_a_process_that_ends_without_closing_writes_what_is_queued(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", ENDING, str(tmp_path)], check=True)
    assert events(tmp_path) == ["start", "keys", "stop", "head"]
    assert verify(tmp_path).ok


BEGINNING = """
import sys
from pathlib import Path
from steerserve.audit import AuditLog
AuditLog(Path(sys.argv[1]), sys.argv[2]).close()
"""


def test_processes_that_start_at_once_share_one_key(tmp_path: Path) -> None:
    children = [
        subprocess.Popen([sys.executable, "-c", BEGINNING, str(tmp_path), f"api-{i}"]) for i in range(3)
    ]
    assert [child.wait() for child in children] == [0, 0, 0]
    verdict = verify(tmp_path)
    assert verdict.ok
    assert len(verdict.chains) == 3
