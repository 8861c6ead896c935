"""wire: what goes in is what was meant, and nothing else goes in."""

from __future__ import annotations

import math
import zlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memstore import wire
from memstore.errors import InvalidRequest, QuotaExceeded
from memstore.index.settings import SETTINGS, filled_in
from memstore.plane import DATA_TYPES, InlinePlane, ProcessPlane, bytes_of
from memstore.types import (
    Durability,
    Hits,
    IndexKind,
    IndexSettings,
    MemoryCounts,
    MemorySpec,
    Metric,
    PayloadSpec,
    SequenceResult,
    StepResult,
)
from memstore.v1 import memstore_pb2 as pb
from memstore.wire import batch
from tests.bad_requests import SPECS, STEPS
from tests.serving import spec, step, tensor

INLINE = InlinePlane(63 << 20)
NOTES = wire.decode_spec(spec())
TWO_LAYERS = MemorySpec(
    name="notes",
    dim=4,
    capacity=8,
    num_layers=2,
    payloads=(
        PayloadSpec(name="hidden", dtype=torch.float32, shape=(3,)),
        PayloadSpec(name="page", dtype=torch.int8, shape=(2, 2)),
    ),
)


@pytest.mark.parametrize(("request_", "field"), [row[1:] for row in SPECS], ids=[row[0] for row in SPECS])
def test_a_bad_spec_names_its_field(request_: pb.MemorySpec, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        wire.decode_spec(request_)
    assert caught.value.metadata == {"field": field}


STEP_ROWS = [row for row in STEPS if row[2] != "memory"]  # the memory's name is looked at where it is looked up


@pytest.mark.parametrize(("request_", "field"), [row[1:] for row in STEP_ROWS], ids=[row[0] for row in STEP_ROWS])
def test_a_bad_step_names_its_field(request_: wire.StepLike, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        wire.decode_batch(request_, NOTES, INLINE)
    assert caught.value.metadata == {"field": field}


def test_a_short_spec_gets_its_defaults() -> None:
    decoded = wire.decode_spec(pb.MemorySpec(name="m", dim=3, capacity=5))
    assert decoded == MemorySpec(name="m", dim=3, capacity=5)


def test_a_spec_at_every_limit_is_taken() -> None:
    payloads = [pb.PayloadSpec(name=f"{i}" * 64, dtype=pb.DATA_TYPE_INT8, shape=[1, 1, 1, 1]) for i in range(8)]
    tags = {f"{i:063}": "v" * 255 for i in range(64)}
    largest = pb.MemorySpec(
        name="9" * 128,
        dim=8_192,
        capacity=16_777_216,
        max_sequences=65_536,
        num_layers=256,
        payloads=payloads,
        tags=tags,
    )
    assert wire.decode_spec(largest).max_sequences == 65_536


@pytest.mark.parametrize("kind", [3, 4, 5])
@given(capacity=st.integers(1, 134_217_728), dim=st.integers(1, 8192), rows=st.just(0) | st.integers(512, 16_777_216))
def test_what_is_chosen_for_a_large_index_is_within_its_limits(kind: int, capacity: int, dim: int, rows: int) -> None:
    given_spec = pb.MemorySpec(name="m", dim=dim, capacity=capacity, index=kind)  # type: ignore[arg-type]
    given_spec.index_settings.generation_rows = rows
    decoded = wire.decode_spec(given_spec)
    assert decoded.index_settings is not None
    assert rows in (0, decoded.index_settings.generation_rows)
    assert wire.decode_spec(wire.encode_spec(decoded)) == decoded


NAMES = st.text("abc0_", min_size=1, max_size=8)


@settings(deadline=None, max_examples=50)
@given(
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    metric=st.sampled_from(Metric),
    index=st.sampled_from(IndexKind),
    payloads=st.dictionaries(NAMES, st.tuples(st.sampled_from([*DATA_TYPES]), st.integers(1, 9)), max_size=3),
    tags=st.dictionaries(NAMES, st.text(max_size=9), max_size=3),
    numbers=st.tuples(*[st.integers(1, 256)] * 4),
)
def test_a_spec_comes_back_as_it_went(
    dtype: torch.dtype,
    metric: Metric,
    index: IndexKind,
    payloads: dict[str, tuple[torch.dtype, int]],
    tags: dict[str, str],
    numbers: tuple[int, int, int, int],
) -> None:
    given_spec = MemorySpec(
        name="m",
        dim=numbers[0],
        capacity=numbers[1],
        max_sequences=numbers[2],
        num_layers=numbers[3],
        dtype=dtype,
        metric=metric,
        index=index,
        index_settings=filled_in(index, IndexSettings(), numbers[1], numbers[0]) if index in SETTINGS else None,
        payloads=tuple(PayloadSpec(name=name, dtype=kind, shape=(n,)) for name, (kind, n) in payloads.items()),
        tags=tags,
    )
    again = pb.MemorySpec.FromString(wire.encode_spec(given_spec).SerializeToString())
    assert wire.decode_spec(again) == given_spec


def _two_layer_step(payloads: dict[str, torch.Tensor], **changes: object) -> pb.StepRequest:
    named = [pb.NamedTensor(name=name, tensor=INLINE.write(value)) for name, value in payloads.items()]
    keys = torch.arange(24.0).reshape(2, 3, 4)
    parts = [pb.SequencePart(sequence="a", num_rows=1), pb.SequencePart(sequence="b", num_rows=2)]
    fields = {"memory": "notes", "sequences": parts, "append": True, "writer": "w", "keys": tensor(keys)}
    return pb.StepRequest(payloads=named, **{**fields, **changes})  # type: ignore[arg-type]


PAYLOADS = {
    "page": torch.arange(24, dtype=torch.int8).reshape(2, 3, 2, 2),
    "hidden": torch.arange(18.0).reshape(2, 3, 3),
}


def test_a_step_is_read_in_full() -> None:
    batch = wire.decode_batch(_two_layer_step(PAYLOADS), TWO_LAYERS, INLINE)
    assert batch.layers == (0, 1)
    assert [(part.sequence, part.num_rows) for part in batch.parts] == [("a", 1), ("b", 2)]
    assert torch.equal(batch.keys, torch.arange(24.0).reshape(2, 3, 4))
    assert list(batch.payloads) == ["hidden", "page"]  # in the order of the spec
    assert all(torch.equal(batch.payloads[name], PAYLOADS[name]) for name in PAYLOADS)


def test_a_fingerprint_stands_for_every_byte_of_a_part() -> None:
    def fingerprints(payloads: dict[str, torch.Tensor], keys: torch.Tensor) -> tuple[int, ...]:
        return wire.decode_batch(_two_layer_step(payloads, keys=tensor(keys)), TWO_LAYERS, INLINE).fingerprints

    keys = torch.arange(24.0).reshape(2, 3, 4)
    first = fingerprints(PAYLOADS, keys)
    content = (
        keys[:, :1].numpy().tobytes()
        + PAYLOADS["hidden"][:, :1].numpy().tobytes()
        + PAYLOADS["page"][:, :1].numpy().tobytes()
    )
    assert first[0] == zlib.crc32(content)
    keys[1, 2, 3] += 1
    assert fingerprints(PAYLOADS, keys)[0] == first[0]
    assert fingerprints(PAYLOADS, keys)[1] != first[1]
    other = {**PAYLOADS, "page": PAYLOADS["page"] + 1}
    assert fingerprints(other, torch.arange(24.0).reshape(2, 3, 4))[0] != first[0]


def test_what_cannot_be_resent_has_no_fingerprint() -> None:
    assert wire.decode_batch(_two_layer_step(PAYLOADS, writer=""), TWO_LAYERS, INLINE).fingerprints == ()
    plane = ProcessPlane()
    request = step(keys=plane.write(torch.zeros(1, 1, 4)))
    assert wire.decode_batch(request, NOTES, plane).fingerprints == ()


@pytest.mark.parametrize(
    ("payloads", "field"),
    [
        ({}, "payloads"),
        ({"hidden": PAYLOADS["hidden"]}, "payloads"),
        ({**PAYLOADS, "more": PAYLOADS["hidden"]}, "payloads"),
        ({**PAYLOADS, "hidden": torch.zeros(2, 3, 4)}, "payloads[1].tensor"),
        ({**PAYLOADS, "hidden": torch.zeros(2, 2, 3)}, "payloads[1].tensor"),
        ({**PAYLOADS, "hidden": torch.zeros(2, 3, 3, dtype=torch.float16)}, "payloads[1].tensor"),
    ],
)
def test_payloads_are_complete_and_of_the_spec(payloads: dict[str, torch.Tensor], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        wire.decode_batch(_two_layer_step(payloads), TWO_LAYERS, INLINE)
    assert caught.value.metadata == {"field": field}


def test_payloads_stay_at_home_where_nothing_is_appended() -> None:
    with pytest.raises(InvalidRequest, match="payloads"):
        wire.decode_batch(_two_layer_step(PAYLOADS, append=False), TWO_LAYERS, INLINE)
    assert wire.decode_batch(_two_layer_step({}, append=False), TWO_LAYERS, INLINE).payloads == {}


def test_an_append_is_for_every_layer() -> None:
    with pytest.raises(InvalidRequest, match="layers: an append"):
        wire.decode_batch(_two_layer_step(PAYLOADS, layers=[1]), TWO_LAYERS, INLINE)
    one = _two_layer_step({}, append=False, layers=[1], keys=tensor(torch.zeros(1, 3, 4)))
    assert wire.decode_batch(one, TWO_LAYERS, INLINE).layers == (1,)


def test_a_key_beyond_what_the_memory_keeps_is_refused_where_it_would_be_kept() -> None:
    narrow = wire.decode_spec(spec(dtype=pb.DATA_TYPE_FP16))
    large = tensor(torch.full((1, 1, 4), 70_000.0))
    with pytest.raises(InvalidRequest, match="65504"):
        wire.decode_batch(step(keys=large), narrow, INLINE)
    assert wire.decode_batch(step(keys=large, append=False), narrow, INLINE).keys.max() == 70_000


def test_no_rows_are_a_batch_too() -> None:
    batch = wire.decode_batch(step(rows=0, keys=tensor(torch.zeros(1, 0, 4))), NOTES, INLINE)
    assert batch.keys.shape == (1, 0, 4)
    assert batch.fingerprints == (0,)


def _result(rows: int) -> StepResult:
    hits = Hits(
        row_splits=torch.tensor([0, rows]),
        positions=torch.arange(rows),
        index=torch.zeros(1, 1, 1, 1, dtype=torch.int32),
        scores=None,
        arrays={"key": torch.ones(rows, 4), "hidden": torch.ones(rows, 2)},
    )
    sequence = SequenceResult(epoch=7, as_of=3, live_begin=1, first_position=3, num_appended=2, is_replay=True)
    return StepResult(sequences=(sequence,), hits=hits)


def _reply(request: wire.StepLike, plane: InlinePlane = INLINE, durability: Durability = Durability.VOLATILE) -> Any:
    result = _result(3)
    reply = wire.Reply(request, plane, durability)
    assert result.hits is not None
    reply.carry(result.hits)
    return reply.finish(result.sequences)


def test_a_reply_has_what_was_found() -> None:
    reply = _reply(pb.StepRequest())
    first = reply.sequences[0]
    assert (first.epoch, first.as_of, first.live_begin, first.first_position, first.num_appended) == (7, 3, 1, 3, 2)
    assert first.is_replay
    assert first.durability == pb.DURABILITY_VOLATILE
    always = _reply(pb.StepRequest(), durability=Durability.ALWAYS)
    assert always.sequences[0].durability == pb.DURABILITY_ALWAYS
    assert not reply.hits.HasField("scores")
    assert [array.name for array in reply.hits.arrays] == ["key", "hidden"]
    assert torch.equal(INLINE.read(reply.hits.arrays[1].tensor, "hidden"), torch.ones(3, 2))
    assert INLINE.read(reply.hits.positions, "positions").tolist() == [0, 1, 2]
    assert _reply(pb.RetrieveRequest()).hits == reply.hits
    assert _reply(pb.AppendRequest()).sequences[0] == first


def test_a_reply_that_does_not_fit_says_so() -> None:
    with pytest.raises(QuotaExceeded, match="at most 64"):
        _reply(pb.StepRequest(), InlinePlane(64))


def test_a_description_has_spec_and_counts() -> None:
    counts = MemoryCounts(num_sequences=1, num_rows=2, reserved_bytes=3, appended_rows=4, evicted_rows=5)
    shown = wire.encode_description(NOTES, counts, 12.5, "cpu")
    held = shown.status
    assert (held.num_sequences, held.num_rows, held.reserved_bytes, held.appended_rows, held.evicted_rows) == (
        1,
        2,
        3,
        4,
        5,
    )
    assert (held.device, held.created_at.ToMilliseconds()) == ("cpu", 12_500)
    assert wire.decode_spec(shown.spec) == NOTES


@pytest.mark.parametrize("most", [65504.0, 1e17, 3.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_of_all_numbers_of_16_bits_those_within_the_limit_are_taken(dtype: torch.dtype, most: float) -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    expected = every.view(dtype).double().abs() <= most  # false for NaN
    content = bytes_of(every)
    step = 97
    found = [batch._is_within(content[2 * at : 2 * at + 2], dtype, most) for at in range(0, len(every), step)]
    assert found == expected[::step].tolist()
    edges = [at for at in range(1, len(every)) if expected[at] != expected[at - 1]]
    assert len(edges) == 3, "where negative ones end, where others begin, and where they end"
    for at in (place for edge in edges for place in (edge - 1, edge)):
        assert batch._is_within(content[2 * at : 2 * at + 2], dtype, most) == expected[at]


@pytest.mark.parametrize("most", [65504.0, 1e17, torch.finfo(torch.float32).max])
def test_of_32_bits_too(most: float) -> None:
    nearest = torch.tensor(most, dtype=torch.float64).float()
    near = torch.stack([torch.nextafter(nearest, torch.tensor(0.0)), nearest, torch.nextafter(nearest, nearest * 2)])
    for value in (*near, *-near, torch.tensor(torch.nan), torch.tensor(torch.inf), torch.tensor(0.0)):
        assert batch._is_within(bytes_of(value), torch.float32, most) == (abs(value.item()) <= most)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -9.0])
def test_the_largest_magnitude_is_no_number_where_an_element_is_none(dtype: torch.dtype, bad: float) -> None:
    keys = torch.linspace(-4, 5, 600).to(dtype).view(1, 2, 300)
    assert batch.largest(keys) == 5.0
    keys[0, 1, 7] = bad
    largest = batch.largest(keys)
    assert math.isnan(largest) if math.isnan(bad) else largest == abs(bad)
