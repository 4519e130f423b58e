"""The GPU's kernels compiled for GPUs that are not here: what ptxas makes of them."""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

import steerserve.steer.triton as kernels
from steerserve.steer import History, PointBuffers
from steerserve.tally import Tallies
from steerserve.tokens import Batch
from steerserve.window import Window, resolve
from tests.unit.steer.launches import KERNELS

# A100, H200, B200.
pytestmark = pytest.mark.interpreted

TARGETS = (80, 90, 100)
# Of Qwen 0.5B, Gemma 2B, Gemma 9B, Llama 8B, Qwen 14B and Llama 70B.
WIDTHS = (896, 2048, 3584, 4096, 5120, 8192)
ROWS = (8, 32, 96)
# Registers a thread, so that two programs of 16 warps share a multiprocessor; and what of a thread's numbers
# ptxas may keep on the stack for that, in bytes: where the width is no multiple of a block, up to 14 of them.
MOST_REGISTERS, MOST_STACK = 64, 56
# Where the stream is one tensor, the compiler has loads to spare, begins two blocks' at once and keeps more.
MOST_STACK_OF_ONE = 104


@dataclass
class Compiled:
    """Stands for a kernel: compiles it from what its launcher hands over; launches nothing."""

    kernel: Any
    target: int
    ptx: str = ""
    registers: int = 0
    stack: int = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._compile

    def _compile(self, *given: Any, **named: Any) -> None:
        arguments = dict(zip(self.kernel.arg_names, given, strict=False))
        constants = {name: value for name, value in named.items() if name in self.kernel.arg_names}
        options = {name: value for name, value in named.items() if name not in constants}
        constants |= {name: None for name, value in arguments.items() if value is None}
        signature = {
            name: "constexpr" if name in constants else mangle_type(arguments[name])
            for name in self.kernel.arg_names
        }
        # Loads of 16 bytes need tensors known to lie at multiples of 16, as allocated ones do.
        aligned = [
            (i,)
            for i, name in enumerate(arguments)
            if name not in constants and (isinstance(arguments[name], Tensor) or arguments[name] % 16 == 0)
        ]
        attributes = {index: [["tt.divisibility", 16]] for index in aligned}
        source = ASTSource(self.kernel, signature, constants, attributes)
        found = triton.compile(source, target=GPUTarget("cuda", self.target, 32), options=options)
        self.ptx = found.asm["ptx"]
        usage = _resource_usage(found.asm["cubin"])
        self.registers = int(re.findall(r"REG:(\d+)", usage)[0])
        self.stack = int(re.findall(r"STACK:(\d+)", usage)[0])

    @property
    def wide_loads(self) -> int:
        """Loads of 16 bytes a thread."""
        return len(re.findall(r"ld\.global[.:\w]*\.v4\.b32", self.ptx))


def _resource_usage(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = Path(triton.knobs.cache.dir) / "kernel.cubin"
    file.write_bytes(cubin)
    command = [str(tool), "--dump-resource-usage", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


Compile = Callable[[int], dict[str, Compiled]]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compile:
    """The kernels, to be compiled for a target as soon as they are launched."""
    if triton.knobs.runtime.interpret:
        pytest.skip("Triton was told to interpret kernels, not to compile them")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def prepare(target: int) -> dict[str, Compiled]:
        found = {}
        for name in KERNELS:
            module = importlib.import_module(f"steerserve.steer.triton.{name}")
            found[name] = Compiled(getattr(module, f"_{name}"), target)
            monkeypatch.setattr(module, f"_{name}", found[name])
        return found

    return prepare


def _check_op(compiled: Compile, target: int, width: int, rows: int, *, two_parts: bool = True) -> None:
    stream, buffers, notes = (
        torch.zeros(1, width, dtype=torch.bfloat16),
        PointBuffers(1, rows, width),
        History.blank(1),
    )
    addend, slot = stream if two_parts else None, torch.zeros(1, dtype=torch.int32)
    mask, trace = torch.zeros(1, dtype=torch.int64), torch.zeros(1, rows, 2)
    own = compiled(target)
    kernels.note_triton(stream, addend, buffers, slot, mask, notes)
    kernels.steer_triton(stream, addend, buffers, slot, mask, trace, notes)
    kernels.hold_triton(stream, addend, buffers, slot, trace, notes)
    most = MOST_STACK if two_parts else MOST_STACK_OF_ONE
    for name in ("note", "steer", "hold"):
        found = own[name]
        assert found.registers <= MOST_REGISTERS, (name, found.registers)
        assert found.stack <= most, (name, found.stack)
    # Encoder rows come in tiles of eight, and decoder rows in `steer` too; `hold` takes one row at a time.
    least = {"note": 8, "steer": 16, "hold": 2}
    assert {name for name, loads in least.items() if own[name].wide_loads < loads} == set()


# Each width, each number of rows, each target.
@pytest.mark.parametrize(("target", "width", "rows"), [(90, 4096, 32), (80, 3584, 96), (100, 5120, 8)])
def test_the_op_fits_the_registers_and_loads_sixteen_bytes_at_once(
    compiled: Compile, target: int, width: int, rows: int
) -> None:
    _check_op(compiled, target, width, rows)


@pytest.mark.slow
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("target", TARGETS)
def test_the_op_fits_the_registers_of_every_gpu_at_every_size(
    compiled: Compile, target: int, width: int, rows: int
) -> None:
    _check_op(compiled, target, width, rows)


@pytest.mark.slow
@pytest.mark.parametrize("width", [896, 4096, 8192])
def test_the_op_fits_the_registers_where_the_stream_is_one_tensor(compiled: Compile, width: int) -> None:
    _check_op(compiled, 90, width, 128, two_parts=False)


def test_the_token_map_and_the_count_fit_the_registers(compiled: Compile) -> None:
    selector = resolve([Window()], 4)
    int32, int64 = torch.zeros(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int64)
    own = compiled(90)
    kernels.fill_triton(
        kernels.DeviceBatch.of(Batch.of([0], [selector]), [0], "cpu"),
        int32, int64, int32, torch.zeros(8, dtype=torch.bool), int32, int64, int32, int64,
        History.blank(1).since,
    )  # fmt: skip
    kernels.count_triton(
        Tallies(2).table, Tallies(2).recent, int32, int32, int64, int64, int64, PointBuffers(1, 32, 16),
        torch.zeros(8, 32, 2),
    )  # fmt: skip
    assert own["fill"].registers > 0
    assert own["count"].registers > 0
    assert (own["fill"].stack, own["count"].stack) == (0, 0)
