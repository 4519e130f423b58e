"""`steer_dense` against a loop over tokens in which SAELens encodes, and decodes what was edited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steerserve.sae import FeatureRows, Sae, open_sae
from steerserve.sae.resident import Resident
from steerserve.steer.buffers import PointBuffers
from steerserve.steer.dense import steer_dense
from steerserve.steer.history import History
from steerserve.steer.reference import steer_reference
from tests.support.models import D_MODEL
from tests.support.plain import PLAIN
from tests.support.saes import D_SAE, load_sae, make_sae, make_switch, make_trained

INF = float("inf")
SLOTS, K = 6, 7
KINDS: dict[str, dict[str, Any]] = {
    "topk": {"k": 12},
    "topk, rescaled": {"k": 12, "rescale_acts_by_decoder_norm": True},
    "topk, layer_norm": {"k": 12, "normalize_activations": "layer_norm"},
    "standard, layer_norm": {"normalize_activations": "layer_norm"},
    "jumprelu, constant_norm_rescale": {"normalize_activations": "constant_norm_rescale"},
    "jumprelu": {},
    "kron": {},
    "switch": {},
    "vaease": {},
}


@dataclass(frozen=True)
class Edit:
    """A row by hand; `gate` is (row index, above, below); bit −1 is read by conditions alone."""

    sae: int
    feature: int
    a: float = 1.0
    c: float = 0.0
    lo: float = -INF
    hi: float = INF
    bit: int = 0
    gate: tuple[int, float, float] | None = None

    def __call__(self, f: float) -> float:
        return min(max(self.a * f + self.c, self.lo), self.hi)


def _fill(
    buffers: PointBuffers,
    slot: int,
    edits: Sequence[Edit],
    saes: Sequence[Sae],
    *,
    resident: Sequence[int],
    drop: int = -1,
) -> None:
    buffers.count[slot], buffers.drop[slot] = len(edits), drop
    buffers.above[slot, : len(edits), : len(edits)] = -INF
    buffers.below[slot, : len(edits), : len(edits)] = INF
    for i, edit in enumerate(edits):
        row: FeatureRows = saes[edit.sae].rows([edit.feature])
        buffers.encoder[slot, i], buffers.decoder[slot, i] = row.encoder[0], row.decoder[0]
        own = (row.bias, row.threshold, row.scale, row.shift, row.floor)
        edit_numbers = torch.tensor([edit.a, edit.c, edit.lo, edit.hi])
        buffers.params[slot, i, :9] = torch.cat([torch.stack(own)[:, 0], edit_numbers])
        buffers.bit[slot, i], buffers.feature[slot, i] = edit.bit, edit.feature
        buffers.resident[slot, i] = resident[edit.sae]
        if edit.gate is not None:
            j, buffers.above[slot, i, j], buffers.below[slot, i, j] = edit.gate


def _buffers() -> PointBuffers:
    """Rows that no plan filled hold NaN, as memory may."""
    buffers = PointBuffers(SLOTS, K, D_MODEL)
    for part in (buffers.encoder, buffers.decoder, buffers.params, buffers.above, buffers.below):
        part.fill_(torch.nan)
    buffers.bit.fill_(99)
    buffers.feature.fill_(10**9)
    return buffers


def _edits(sae: int) -> list[list[Edit]]:
    """What six slots do to one SAE: every operation, gates, rows that are only read."""
    return [
        [Edit(sae, 3, a=0, c=2.5, bit=0)],
        [Edit(sae, 5, a=0, c=0, bit=2), Edit(sae, 9, a=1, c=1.5, bit=0), Edit(sae, 70, a=-2, bit=1)],
        [Edit(sae, 9, a=0, c=3, bit=0, gate=(1, 0.05, INF)), Edit(sae, 11, bit=-1)],
        [Edit(sae, 20, a=0, c=4, bit=1, gate=(0, 0.0, INF)), Edit(sae, 21, lo=1.0, bit=0)],
        [Edit(sae, 30, hi=0.3, bit=0, gate=(0, 0.2, 0.9))],
        [Edit(sae, j, a=1, c=0.5, bit=j) for j in range(K)],
    ]


@dataclass(frozen=True)
class Case:
    stream: Tensor
    addend: Tensor | None
    tokens: Tensor
    slot: Tensor
    rows: Tensor

    @property
    def x(self) -> Tensor:
        return self.stream.float() if self.addend is None else self.stream.float() + self.addend.float()


def _case(*, two_parts: bool = True, dtype: torch.dtype = torch.float32, n: int = 48) -> Case:
    generator = torch.Generator().manual_seed(4)
    stream = (torch.randn(n, D_MODEL, generator=generator) * 2).to(dtype)
    addend = torch.randn(n, D_MODEL, generator=generator).to(dtype) + 0.5 if two_parts else None
    tokens = torch.arange(1, n, 2)
    slot = torch.randint(-1, SLOTS, (len(tokens),), generator=generator, dtype=torch.int32)
    rows = torch.randint(0, 2**8, (len(tokens),), generator=generator)
    rows[:3], slot[:3] = 0, torch.tensor([0, 1, 5], dtype=torch.int32)
    return Case(stream, addend, tokens, slot, rows)


def _expected(
    case: Case, edits: Sequence[Sequence[Edit]], theirs: Sequence[Any], drop: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """x' and the trace, one token after the other; each SAE's part of the change is decoded by SAELens."""
    x, trace = case.x.clone(), torch.full((len(case.tokens), K, 2), torch.nan)
    for i, t in enumerate(case.tokens.tolist()):
        slot = int(case.slot[i])
        if slot < 0:
            continue
        rows = edits[slot]
        f = [_encode(sae, case.x[t]) for sae in theirs]
        new = [part.clone() for part in f]
        listed = [row.bit >= 0 and bool((int(case.rows[i]) >> row.bit) & 1) for row in rows]
        for k, row in enumerate(rows):
            own = float(f[row.sae][row.feature])
            if row.gate is not None:
                at, above, below = row.gate
                read = float(f[rows[at].sae][rows[at].feature])
                if not above < read < below:
                    continue
            if listed[k]:
                new[row.sae][row.feature] = row(own)
                trace[i, k] = torch.tensor([own, row(own)])
        if not any(listed):
            continue
        for index, sae in enumerate(theirs):
            edited = _decode(sae, case.x[t], new[index])
            if drop[slot] == index:
                x[t] += edited - case.x[t]
            elif not torch.equal(new[index], f[index]):
                x[t] += edited - _decode(sae, case.x[t], f[index])
    return x, trace


def _encode(sae: Any, x: Tensor) -> Tensor:
    f: Tensor = sae.encode(x.unsqueeze(0)).detach()[0]
    return f


def _decode(sae: Any, x: Tensor, f: Tensor) -> Tensor:
    # SAELens keeps a token's mean and deviation from encode until decode.
    sae.encode(x.unsqueeze(0))
    out: Tensor = sae.decode(f.unsqueeze(0)).detach()[0]
    return out


def _steer(case: Case, buffers: PointBuffers, residents: Sequence[Resident | None]) -> tuple[Tensor, Tensor]:
    stream, trace = case.stream.clone(), torch.zeros(len(case.tokens), K, 2)
    steer_dense(
        stream,
        case.addend,
        buffers,
        case.tokens,
        case.slot,
        case.rows,
        trace,
        residents,
        History.blank(len(case.tokens)),
    )
    untouched = torch.ones(len(stream), dtype=torch.bool)
    untouched[case.tokens[case.slot >= 0]] = False
    assert torch.equal(stream[untouched], case.stream[untouched])
    return stream, trace


def _make(folder: Path, kind: str, seed: int) -> Path:
    if kind in PLAIN:
        return make_trained(folder / kind, kind, 2, seed=seed)
    return make_sae(folder / kind, kind.split(",")[0], 2, seed=seed, **KINDS[kind])


@pytest.mark.parametrize("error", ["keep", "drop"])
@pytest.mark.parametrize("two_parts", [True, False], ids=["residual", "one tensor"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_encode_edit_decode(kind: str, two_parts: bool, error: str, tmp_path: Path) -> None:
    folder = _make(tmp_path, kind, 0)
    sae, buffers, edits = open_sae(folder), _buffers(), _edits(0)
    drop = [0 if error == "drop" else -1] * SLOTS
    for slot in range(SLOTS):
        _fill(buffers, slot, edits[slot], [sae], resident=[0], drop=drop[slot])
    case = _case(two_parts=two_parts)
    expected, expected_trace = _expected(case, edits, [load_sae(folder)], drop)
    stream, trace = _steer(case, buffers, [Resident.of(sae)])
    got = stream if case.addend is None else stream + case.addend
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(trace, expected_trace, atol=1e-5, rtol=1e-5, equal_nan=True)
    assert not trace.isnan().all()
    assert not torch.equal(stream, case.stream)


@pytest.mark.parametrize("pieces", [False, True], ids=["at once", "in pieces"])
def test_several_saes_at_one_hook_point_are_read_from_the_same_stream(
    pieces: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pieces:
        monkeypatch.setattr("steerserve.sae.resident._ACTIVATIONS_AT_ONCE", 5 * D_SAE)
    kinds = ["topk, rescaled", "jumprelu", "topk, layer_norm"]
    folders = [_make(tmp_path, kind, seed) for seed, kind in enumerate(kinds)]
    saes, edits = [open_sae(folder) for folder in folders], [_edits(slot % 3)[slot] for slot in range(SLOTS)]
    edits[1] = [Edit(0, 5, a=0, c=1, bit=0, gate=(2, 0.0, INF)), Edit(2, 5, a=2, bit=1), Edit(1, 8, bit=-1)]
    edits[3] = [Edit(1, 5, a=0, c=2, bit=0), Edit(2, 6, a=0, c=1, bit=1, gate=(0, 0.0, INF))]
    drop, buffers = [-1, 2, -1, 0, 0, 2], _buffers()
    for slot in range(SLOTS):
        # The JumpReLU SAE's rows compute themselves.
        _fill(buffers, slot, edits[slot], saes, resident=[0, -1, 2], drop=drop[slot])
    case = _case()
    expected, expected_trace = _expected(case, edits, [load_sae(folder) for folder in folders], drop)
    residents = [Resident.of(saes[0]), None, Resident.of(saes[2])]
    stream, trace = _steer(case, buffers, residents)
    assert case.addend is not None
    torch.testing.assert_close(stream + case.addend, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(trace, expected_trace, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("error", ["keep", "drop"])
def test_a_switch_saes_edit_weighs_what_its_router_says(error: str, tmp_path: Path) -> None:
    sae, buffers, edits = open_sae(make_switch(tmp_path, 2)), _buffers(), _edits(0)
    for slot in range(SLOTS):
        _fill(buffers, slot, edits[slot], [sae], resident=[0], drop=0 if error == "drop" else -1)
    case, resident = _case(), Resident.of(sae)
    encoded = resident.encode(case.x)

    class Same:
        """Resident in SAELens' place: test_switch.py holds it to the paper's formula."""

        def encode(self, x: Tensor) -> Tensor:
            self.encoded = resident.encode(x)
            return self.encoded.f.clone()

        def decode(self, f: Tensor) -> Tensor:
            return resident.decode(f, self.encoded)

    expected, expected_trace = _expected(case, edits, [Same()], [0 if error == "drop" else -1] * SLOTS)
    stream, trace = _steer(case, buffers, [resident])
    assert case.addend is not None
    torch.testing.assert_close(stream + case.addend, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(trace, expected_trace, atol=1e-5, rtol=1e-5, equal_nan=True)
    assert (encoded.gain < 1).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_streams_are_steered_in_float32(
    dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    folder = _make(tmp_path, "topk", 0)
    sae, buffers, edits = open_sae(folder), _buffers(), _edits(0)
    for slot in range(SLOTS):
        _fill(buffers, slot, edits[slot], [sae], resident=[0], drop=slot % 2 - 1)
    case = _case(dtype=dtype)
    expected, expected_trace = _expected(case, edits, [load_sae(folder)], [s % 2 - 1 for s in range(SLOTS)])
    stream, trace = _steer(case, buffers, [Resident.of(sae)])
    assert stream.dtype == dtype
    assert case.addend is not None
    torch.testing.assert_close(stream.float() + case.addend.float(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(trace, expected_trace, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_rows_that_need_no_resident_are_the_references(tmp_path: Path) -> None:
    sae, buffers, edits = open_sae(_make(tmp_path, "jumprelu", 0)), _buffers(), _edits(0)
    for slot in range(SLOTS):
        _fill(buffers, slot, edits[slot], [sae], resident=[-1])
    case = _case()
    stream, trace = _steer(case, buffers, [])
    expected, expected_trace = case.stream.clone(), torch.empty(len(case.stream), K, 2)
    slots = torch.full((len(expected),), -1, dtype=torch.int32)
    rows = torch.zeros(len(expected), dtype=torch.long)
    slots[case.tokens], rows[case.tokens] = case.slot, case.rows
    steer_reference(expected, case.addend, buffers, slots, rows, expected_trace)
    torch.testing.assert_close(stream, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(trace, expected_trace[case.tokens], atol=1e-5, rtol=1e-5, equal_nan=True)


def test_a_token_with_no_listed_row_keeps_its_error_and_its_bits(tmp_path: Path) -> None:
    sae, buffers = open_sae(_make(tmp_path, "topk", 0)), _buffers()
    _fill(buffers, 0, [Edit(0, 3, a=0, c=2, bit=1)], [sae], resident=[0], drop=0)
    case = _case()
    none = Case(
        case.stream, case.addend, case.tokens, torch.zeros_like(case.slot), torch.ones_like(case.rows)
    )
    stream, trace = _steer(none, buffers, [Resident.of(sae)])
    assert torch.equal(stream, case.stream)
    assert trace.isnan().all()


def test_the_error_is_dropped_though_no_condition_holds(tmp_path: Path) -> None:
    folder = _make(tmp_path, "topk, layer_norm", 0)
    sae, buffers = open_sae(folder), _buffers()
    _fill(buffers, 0, [Edit(0, 3, a=0, c=2, gate=(0, 1e9, INF))], [sae], resident=[0], drop=0)
    case = _case(two_parts=False)
    every = Case(case.stream, None, case.tokens, torch.zeros_like(case.slot), torch.ones_like(case.rows))
    stream, trace = _steer(every, buffers, [Resident.of(sae)])
    theirs = load_sae(folder)
    expected = theirs.decode(theirs.encode(case.stream)).detach()
    torch.testing.assert_close(stream[case.tokens], expected[case.tokens], atol=1e-5, rtol=1e-5)
    assert trace.isnan().all()


def test_only_the_residents_that_a_tokens_slot_needs_encode_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saes = [open_sae(_make(tmp_path, kind, 0)) for kind in ("topk", "jumprelu")]
    buffers, residents = _buffers(), [Resident.of(sae) for sae in saes]
    _fill(buffers, 0, [Edit(0, 3, a=0, c=2)], saes, resident=[0, 1])
    _fill(buffers, 1, [Edit(1, 3, a=0, c=2)], saes, resident=[0, 1])
    encoded: list[tuple[int, int]] = []
    encode = Resident.encode

    def spy(self: Resident, x: Tensor) -> Any:
        encoded.append((residents.index(self), len(x)))
        return encode(self, x)

    monkeypatch.setattr(Resident, "encode", spy)
    case = _case(n=20)
    slot = torch.tensor([0, 0, 0, 1, 1, -1, -1, 0, 0, 1], dtype=torch.int32)
    rows = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 0, 0])
    _steer(Case(case.stream, case.addend, case.tokens, slot, rows), buffers, residents)
    assert encoded == [(0, 3), (1, 1)]


@pytest.mark.parametrize("error", ["keep", "drop"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite_is_left_alone(bad: float, error: str, tmp_path: Path) -> None:
    sae, buffers = open_sae(_make(tmp_path, "topk", 0)), _buffers()
    drop = 0 if error == "drop" else -1
    _fill(buffers, 0, [Edit(0, 3, a=0, c=2)], [sae], resident=[0], drop=drop)
    case = _case(n=8, two_parts=False)
    case.stream[3, 5] = bad
    every = Case(case.stream, None, case.tokens, torch.zeros_like(case.slot), torch.ones_like(case.rows))
    stream, trace = _steer(every, buffers, [Resident.of(sae)])
    torch.testing.assert_close(stream[3], case.stream[3], rtol=0, atol=0, equal_nan=True)
    assert trace[:, 0, 0].isnan().tolist() == [False, True, False, False]


def test_a_reconstruction_that_is_not_finite_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, buffers = open_sae(_make(tmp_path, "jumprelu", 0)), _buffers()
    _fill(buffers, 0, [Edit(0, 3, a=0, c=2)], [sae], resident=[-1], drop=0)
    case = _case()
    every = Case(
        case.stream, case.addend, case.tokens, torch.zeros_like(case.slot), torch.ones_like(case.rows)
    )
    monkeypatch.setattr(Resident, "decode", lambda self, f, encoded: encoded.offset * torch.inf)
    stream, trace = _steer(every, buffers, [Resident.of(sae)])
    assert torch.equal(stream, case.stream)
    assert trace.isnan().all()


def test_no_token_at_all_is_no_work(tmp_path: Path) -> None:
    sae, buffers = open_sae(_make(tmp_path, "topk", 0)), _buffers()
    case = _case()
    none = Case(case.stream, case.addend, case.tokens[:0], case.slot[:0], case.rows[:0])
    stream, _ = _steer(none, buffers, [Resident.of(sae)])
    assert torch.equal(stream, case.stream)
