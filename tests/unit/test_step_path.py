"""No line that runs in a step on a device makes the host wait for it: a lint of the code that does run there.

What a wait costs is the overlap of asynchronous scheduling, and no test on a CPU would notice.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEP_PATH = (
    "steerserve/steer/*.py",
    "steerserve/steer/triton/*.py",
    "steerserve/runtime/*.py",
    "steerserve/recent.py",
    "steerserve/tally.py",
    "plugins/steerserve_vllm/op.py",
    "plugins/steerserve_vllm/runner_v2.py",
    "plugins/steerserve_vllm/ending.py",
)
# These only ever see host memory.
ON_THE_HOST = {
    "steerserve/steer/cpu.py": "the CPU's loops",
    "steerserve/steer/reference.py": "what kernels are compared with in tests",
    "steerserve/runtime/host.py": "the CPU's runtime",
}
WAITS = {"cpu", "item", "tolist", "cuda", "nonzero", "unique", "masked_select", "synchronize", "numpy"}
CONVERSIONS = {"int", "float", "bool"}
# What `.to` is given where it changes a type and not the place.
TYPES = re.compile(r"^tl\.|dtype$|element_ty$|^torch\.(float|int|bool)")

# (file, function, what is done there): why nothing waits, or why it may.
_EAGER = "only for resident SAEs, which need --enforce-eager"
_ARRIVED = "in host memory by now"
_NUMPY = "an array on the host, laid out before it is sent"
_DICT = "a dict"
EXCEPTIONS = {
    ("steerserve/steer/buffers.py", "_weights", "x[i] ="): _NUMPY,
    ("steerserve/steer/buffers.py", "_weights", ".numpy()"): _NUMPY,
    ("steerserve/steer/buffers.py", "_edits", "x[i] ="): _NUMPY,
    ("steerserve/steer/buffers.py", "_edits", "bool()"): _NUMPY,
    ("steerserve/steer/buffers.py", "PointBuffers.write", "x[i] ="): _DICT,
    ("steerserve/steer/buffers.py", "PointBuffers.views", ".numpy()"): "for the CPU's loops alone",
    ("steerserve/steer/crossing.py", "sent", "x[i] ="): "the pinned buffer, before it is sent",
    ("steerserve/steer/crossing.py", "sent", ".numpy()"): "the pinned buffer, before it is sent",
    ("steerserve/steer/crossing.py", "sent", ".to(non_blocking)"): "from a pinned buffer",
    ("steerserve/steer/crossing.py", "arriving", ".to(non_blocking)"): "to a pinned buffer, with an event",
    ("steerserve/steer/crossing.py", "arriving.wait", ".synchronize()"): "waits where the caller asks",
    ("steerserve/steer/dense.py", "_groups", ".tolist()"): _EAGER,
    ("steerserve/steer/dense.py", "_groups", ".unique()"): _EAGER,
    ("steerserve/steer/dense.py", "_groups", ".nonzero()"): _EAGER,
    ("steerserve/steer/dense.py", "_by_formula", "int()"): _EAGER,
    ("steerserve/steer/dense.py", "_steered", "int()"): _EAGER,
    ("steerserve/steer/dense.py", "_steered", "x[i] ="): _EAGER,
    ("steerserve/steer/dense.py", "_by_resident", ".nonzero()"): _EAGER,
    ("steerserve/runtime/device.py", "DeviceRuntime._launch", ".nonzero()"): _EAGER,
    ("steerserve/runtime/device.py", "DeviceRuntime._launch", "x[i] ="): _EAGER,
    ("steerserve/runtime/device.py", "DeviceRuntime._steer_dense", "x[i] ="): _EAGER,
    ("steerserve/runtime/device.py", "DeviceRuntime.__init__", ".to()"): "once, at start-up",
    ("steerserve/runtime/base.py", "Runtime.__init__", "x[i] ="): "an array on the host, at start-up",
    ("steerserve/runtime/base.py", "Runtime.add", "x[i] ="): _DICT,
    ("steerserve/runtime/base.py", "Runtime.aborts", ".cpu()"): "asked where the step's output is read too",
    ("steerserve/runtime/base.py", "Runtime.aborts_of", "int()"): _ARRIVED,
    ("steerserve/runtime/base.py", "Runtime.aborts_of", ".numpy()"): _ARRIVED,
    ("steerserve/runtime/base.py", "Runtime.aborts_of", "x[i] ="): _DICT,
    ("steerserve/runtime/base.py", "Runtime._ending", "x[i] ="): _NUMPY,
    ("steerserve/recent.py", "Recent.add_to", ".numpy()"): _ARRIVED,
    ("steerserve/recent.py", "Recent.add_to", "bool()"): _ARRIVED,
    ("steerserve/recent.py", "_add", "x[i] ="): _ARRIVED,
    ("steerserve/tally.py", "Tally.until", ".numpy()"): _ARRIVED,
    ("steerserve/tally.py", "Tally.wire", ".tolist()"): _ARRIVED,
    ("steerserve/tally.py", "on_host", ".cpu()"): "for a report, between steps",
    ("steerserve/tally.py", "_tokens", ".tolist()"): _ARRIVED,
    ("steerserve/tally.py", "_tokens", "int()"): _ARRIVED,
    ("steerserve/tally.py", "_tokens", "x[i] ="): _DICT,
    ("steerserve/tally.py", "Tallies.count", ".numpy()"): "the CPU's count",
    ("steerserve/tally.py", "_count", "x[i] ="): "the CPU's count",
    ("plugins/steerserve_vllm/runner_v2.py", "_Steered.preprocess_state", ".cpu()"): "harvests alone",
    ("plugins/steerserve_vllm/runner_v2.py", "_Steered.preprocess_state", ".numpy()"): "harvests alone",
    ("plugins/steerserve_vllm/runner_v2.py", "_Steered._settles_here", "bool()"): "of the host's own",
    ("plugins/steerserve_vllm/ending.py", "_standing", "int()"): "in the engine core",
    ("plugins/steerserve_vllm/ending.py", "_cut", "bool()"): "in the engine core",
    ("plugins/steerserve_vllm/ending.py", "_deliver", "x[i] ="): "in the engine core",
}


class _Lint(ast.NodeVisitor):
    """Finds (function, what, line) of everything that may wait."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str, int]] = []
        self._within: list[str] = []

    def _enter(self, node: ast.ClassDef | ast.FunctionDef) -> None:
        # What is compiled for the device runs there.
        if "triton.jit" in map(ast.unparse, node.decorator_list):
            return
        self._within.append(node.name)
        self.generic_visit(node)
        self._within.pop()

    visit_FunctionDef = visit_ClassDef = _enter

    def _say(self, what: str, node: ast.stmt | ast.expr) -> None:
        self.found.append((".".join(self._within), what, node.lineno))

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            parts = target.elts if isinstance(target, ast.Tuple) else [target]
            if any(isinstance(part, ast.Subscript) for part in parts):
                self._say("x[i] =", node)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Subscript):
            self._say("x[i] =", node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        words = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if isinstance(node.func, ast.Attribute) and name in WAITS:
            self._say(f".{name}()", node)
        if isinstance(node.func, ast.Name) and name in CONVERSIONS:
            self._say(f"{name}()", node)
        moved = [ast.unparse(argument) for argument in node.args]
        if name == "to" and not (moved and all(TYPES.search(argument) for argument in moved)):
            # Whether its source is pinned no lint can tell: that one place sees to it.
            self._say(".to(non_blocking)" if words.get("non_blocking") == "True" else ".to()", node)
        if name in ("tensor", "as_tensor", "asarray", "from_numpy") and "device" in words:
            self._say(f"torch.{name}(device=)", node)
        self.generic_visit(node)


def waits(source: str) -> list[tuple[str, str, int]]:
    lint = _Lint()
    lint.visit(ast.parse(source))
    return lint.found


def step_path() -> Iterator[str]:
    for pattern in STEP_PATH:
        for path in sorted(ROOT.glob(pattern)):
            if (name := path.relative_to(ROOT).as_posix()) not in ON_THE_HOST:
                yield name


def test_nothing_in_the_step_path_waits_for_the_device() -> None:
    found = [(path, *one) for path in step_path() for one in waits((ROOT / path).read_text(encoding="utf-8"))]
    unknown = [
        f"{path}:{line}: {what} in {function}"
        for path, function, what, line in found
        if (path, function, what) not in EXCEPTIONS
    ]
    assert not unknown, "the host would wait for the device; send, fill and read back as `crossing` does"
    unused = EXCEPTIONS.keys() - {(path, function, what) for path, function, what, _ in found}
    assert not unused, "exceptions from what is no longer there"


def test_the_step_path_is_looked_for_where_it_is() -> None:
    assert {"steerserve/steer/buffers.py", "steerserve/runtime/base.py", "steerserve/tally.py"} <= set(
        step_path()
    )
    assert all((ROOT / path).is_file() for path in ON_THE_HOST)


@pytest.mark.parametrize(
    "line",
    [
        "self.settled[number] = settled",
        "self.count[slot] += 1",
        "a[i], b = 1, 2",
        "at = torch.tensor(tables).to(self.device)",
        "at = part.to(self.buffers.device)",
        "at = torch.tensor(tables).to(self.device, non_blocking=True)",
        "at = torch.tensor(tables, device=self.device)",
        "since = self.since[number].cpu()",
        "first = notes.min().item()",
        "rows = self.table[number].tolist()",
        "n = int(buffers.count[slot])",
        "if bool(held.any()): pass",
        "at = torch.nonzero(whole)",
        "torch.cuda.synchronize()",
    ],
)
def test_every_way_of_waiting_is_seen(line: str) -> None:
    assert waits(f"class Runtime:\n    def step(self):\n        {line}")


@pytest.mark.parametrize(
    "line",
    [
        "self.settled[number].fill_(settled)",
        "x = stream.to(torch.float32)",
        "x = delta.to(own.dtype)",
        "limit = torch.minimum(limit, computed)",
    ],
)
def test_what_does_not_wait_is_let_through(line: str) -> None:
    assert not waits(f"def step():\n    {line}")
