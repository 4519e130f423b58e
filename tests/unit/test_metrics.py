import os
import subprocess
import sys
from pathlib import Path

from prometheus_client import REGISTRY

from steerserve.metrics import TokenFeed, admissions, count_rejection, observe_admission, observe_slots
from steerserve.plan import Plan
from steerserve.report import Collected
from steerserve.row import Row
from steerserve.window import Window


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def row(source: str, op: str, feature: int = 0) -> Row:
    return Row(1, source, feature, op, 0.0, 0.0, 0.0, 0.0, (), Window())


def test_an_admission_counts_each_sae_and_op_once() -> None:
    rows = (row("sae:m", "clamp", 1), row("sae:m", "clamp", 2), row("direction:d", "add"))
    before = admissions()
    observe_admission(Plan(rows, "x"), 2e-5)
    assert admissions() == before + 1
    assert sample("steerserve_requests_total", sae="m", op="clamp") == 1
    assert sample("steerserve_requests_total", sae="direction:d", op="add") == 1


def test_rejections_are_counted_by_reason() -> None:
    count_rejection("unit_test")
    assert sample("steerserve_rejections_total", reason="unit_test") == 1


def test_running_totals_become_increments() -> None:
    feed = TokenFeed()
    for total, shown in [(5, 5), (5, 5), (9, 9), (2, 11), (3, 12)]:
        feed.update(Collected(tokens={("sae:t", "add"): total}))
        assert sample("steerserve_tokens_total", sae="t", op="add") == shown


def test_slots_are_shown() -> None:
    observe_slots(Collected(slots_in_use=3, slots_capacity=8))
    assert (sample("steerserve_slots_in_use"), sample("steerserve_slots_capacity")) == (3, 8)


CHILD = """
from steerserve.metrics import TokenFeed, observe_slots, count_rejection
from steerserve.report import Collected
import sys
count_rejection("child")
if sys.argv[1] == "0":
    observe_slots(Collected(slots_in_use=1, slots_capacity=8))
    TokenFeed().update(Collected(tokens={("sae:a", "add"): 7}))
else:
    observe_slots(Collected(slots_in_use=2, slots_capacity=8))
"""
SHOW = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_several_processes_show_one_picture(tmp_path: Path) -> None:
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}

    def python(code: str, *args: str) -> str:
        command = [sys.executable, "-c", code, *args]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    python(CHILD, "0")
    python(CHILD, "1")
    shown = python(SHOW).splitlines()
    assert 'steerserve_rejections_total{reason="child"} 2.0' in shown
    assert 'steerserve_tokens_total{op="add",sae="a"} 7.0' in shown
    assert "steerserve_slots_in_use 2.0" in shown
    assert "steerserve_slots_capacity 8.0" in shown
