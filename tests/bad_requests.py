"""Requests that break the contract, each with the field that the answer must name."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from memstore.v1 import memstore_pb2 as pb
from tests.serving import spec, step, tensor

if TYPE_CHECKING:
    from google.protobuf.message import Message

FP32 = pb.DATA_TYPE_FP32
KEYS = torch.zeros(1, 1, 4)


def _retrieve(**changes: object) -> pb.StepRequest:
    return step(retrieve=pb.RetrieveOptions(**{"top_k": 1, **changes}))  # type: ignore[arg-type]


def _batch(*parts: pb.SequencePart) -> pb.StepRequest:
    request = step()
    del request.sequences[:]
    request.sequences.extend(parts)
    return request


def _keys(**changes: object) -> pb.StepRequest:
    request = step(keys=tensor(KEYS))
    request.keys.MergeFrom(pb.Tensor(**changes))  # type: ignore[arg-type]
    return request


def _with(value: float) -> pb.Tensor:
    keys = KEYS.clone()
    keys[0, 0, 2] = value
    return tensor(keys)


def _payload(**changes: object) -> pb.PayloadSpec:
    return pb.PayloadSpec(**{"name": "hidden", "dtype": FP32, "shape": [2], **changes})  # type: ignore[arg-type]


def _settings(index: pb.IndexKind.ValueType, **settings: int) -> pb.MemorySpec:
    return spec(index=index, index_settings=pb.IndexSettings(**settings))


IVF, PQ, GRAPH = pb.INDEX_KIND_FAISS_IVF_FLAT, pb.INDEX_KIND_FAISS_IVF_PQ, pb.INDEX_KIND_FAISS_CAGRA
PART = pb.SequencePart

SPECS: list[tuple[str, pb.MemorySpec, str]] = [
    ("no name", spec(""), "spec.name"),
    ("a name that begins with a dot", spec(".hidden"), "spec.name"),
    ("a name with a slash", spec("a/b"), "spec.name"),
    ("a name with a line end", spec("a\n"), "spec.name"),
    ("a name beyond ASCII", spec("mémoire"), "spec.name"),
    ("a name of 129", spec("n" * 129), "spec.name"),
    ("no width", pb.MemorySpec(name="m", capacity=8), "spec.dim"),
    ("a width below 0", spec(dim=-1), "spec.dim"),
    ("too wide", spec(dim=8_193), "spec.dim"),
    ("no capacity", pb.MemorySpec(name="m", dim=4), "spec.capacity"),
    ("too much capacity", spec(capacity=16_777_217), "spec.capacity"),
    ("too many sequences", spec(max_sequences=65_537), "spec.max_sequences"),
    ("sequences below 0", spec(max_sequences=-1), "spec.max_sequences"),
    ("too many layers", spec(num_layers=257), "spec.num_layers"),
    ("whole numbers as keys", spec(dtype=pb.DATA_TYPE_INT8), "spec.dtype"),
    ("an unknown metric", spec(metric=99), "spec.metric"),
    ("an unknown index", spec(index=99), "spec.index"),
    ("too much capacity for a large index", spec(capacity=134_217_729, index=IVF), "spec.capacity"),
    (
        "codes of an index without",
        spec(index=pb.INDEX_KIND_FAISS_FLAT, first_pass=pb.FIRST_PASS_INT8),
        "spec.first_pass",
    ),
    ("an unknown first pass", spec(first_pass=9), "spec.first_pass"),
    ("settings of an exact index", _settings(pb.INDEX_KIND_EXACT, nprobe=1), "spec.index_settings.nprobe"),
    ("links of lists", _settings(IVF, graph_degree=8), "spec.index_settings.graph_degree"),
    ("lists of a graph", _settings(GRAPH, nlist=8), "spec.index_settings.nlist"),
    ("codes of whole rows", _settings(IVF, pq_m=2), "spec.index_settings.pq_m"),
    ("generations too small", _settings(IVF, generation_rows=15), "spec.index_settings.generation_rows"),
    ("generations too large", _settings(IVF, generation_rows=16_777_217), "spec.index_settings.generation_rows"),
    ("lists below 0", _settings(IVF, nlist=-1), "spec.index_settings.nlist"),
    ("too many lists", _settings(IVF, nlist=65_537), "spec.index_settings.nlist"),
    ("more lists than rows", _settings(IVF, generation_rows=64, nlist=33), "spec.index_settings.nlist"),
    ("more probes than lists", _settings(IVF, nlist=4, nprobe=5), "spec.index_settings.nprobe"),
    ("too many probes", _settings(IVF, nlist=4096, nprobe=2049), "spec.index_settings.nprobe"),
    ("codes that do not divide a row", _settings(PQ, pq_m=3), "spec.index_settings.pq_m"),
    ("too many codes", _settings(PQ, pq_m=257), "spec.index_settings.pq_m"),
    ("codes of 3 bits", _settings(PQ, pq_bits=3), "spec.index_settings.pq_bits"),
    ("codes of 9 bits", _settings(PQ, pq_bits=9), "spec.index_settings.pq_bits"),
    ("more codes than rows", _settings(PQ, generation_rows=256, pq_bits=8), "spec.index_settings.pq_bits"),
    ("an odd number of links", _settings(GRAPH, graph_degree=33), "spec.index_settings.graph_degree"),
    ("too few links", _settings(GRAPH, graph_degree=2), "spec.index_settings.graph_degree"),
    ("too many links", _settings(GRAPH, graph_degree=130), "spec.index_settings.graph_degree"),
    ("more links than rows", _settings(GRAPH, generation_rows=64, graph_degree=32), "spec.index_settings.graph_degree"),
    ("too short a walk", _settings(GRAPH, itopk=15), "spec.index_settings.itopk"),
    ("too long a walk", _settings(GRAPH, itopk=513), "spec.index_settings.itopk"),
    ("an unknown policy", spec(policy=99), "spec.policy"),
    ("an unknown durability", spec(durability=99), "spec.durability"),
    ("nine payloads", spec(payloads=[_payload(name=f"p{i}") for i in range(9)]), "spec.payloads"),
    ("a payload called key", spec(payloads=[_payload(name="key")]), "spec.payloads[0].name"),
    ("a payload in capitals", spec(payloads=[_payload(name="Hidden")]), "spec.payloads[0].name"),
    ("a payload name of 65", spec(payloads=[_payload(name="p" * 65)]), "spec.payloads[0].name"),
    ("two payloads of one name", spec(payloads=[_payload(), _payload()]), "spec.payloads"),
    ("a payload without dtype", spec(payloads=[_payload(dtype=0)]), "spec.payloads[0].dtype"),
    ("a payload without shape", spec(payloads=[_payload(shape=[])]), "spec.payloads[0].shape"),
    ("a payload of five extents", spec(payloads=[_payload(shape=[1] * 5)]), "spec.payloads[0].shape"),
    ("a payload extent of 0", spec(payloads=[_payload(shape=[0])]), "spec.payloads[0].shape"),
    ("a payload beyond a message", spec(payloads=[_payload(shape=[1 << 40])]), "spec.payloads[0].shape"),
    ("65 tags", spec(tags={str(i): "" for i in range(65)}), "spec.tags"),
    ("a tag without key", spec(tags={"": "x"}), "spec.tags"),
    ("a tag key of 64", spec(tags={"k" * 64: "x"}), "spec.tags"),
    ("a tag value of 256", spec(tags={"k": "v" * 256}), "spec.tags"),
]

STEPS: list[tuple[str, Message, str]] = [
    ("a memory's name that is none", step(memory="../etc"), "memory"),
    ("no sequences", _batch(), "sequences"),
    ("4,097 sequences", _batch(*(PART(sequence=str(i)) for i in range(4_097))), "sequences"),
    ("a sequence twice", _batch(PART(sequence="a", num_rows=1), PART(sequence="a")), "sequences"),
    ("a sequence without name", _batch(PART(num_rows=1)), "sequences[0].sequence"),
    ("a sequence name of 129", _batch(PART(sequence="s" * 129, num_rows=1)), "sequences[0].sequence"),
    ("a sequence with a tab", _batch(PART(sequence="a\tb", num_rows=1)), "sequences[0].sequence"),
    ("a sequence beyond ASCII", _batch(PART(sequence="ä", num_rows=1)), "sequences[0].sequence"),
    ("rows below 0", _batch(PART(sequence="a", num_rows=-1)), "sequences[0]"),
    ("a seq below 0", _batch(PART(sequence="a", num_rows=1, seq=-1)), "sequences[0]"),
    ("an as_of below 0", _batch(PART(sequence="a", num_rows=1, as_of=-1)), "sequences[0]"),
    ("more rows than keys", _batch(PART(sequence="a", num_rows=2)), "keys.shape"),
    ("layers out of order", step(layers=[1, 0]), "layers"),
    ("a layer twice", step(layers=[0, 0]), "layers"),
    ("a layer that is not there", step(layers=[1]), "layers"),
    ("a layer below 0", step(layers=[-1]), "layers"),
    ("no hits", _retrieve(top_k=0), "retrieve.top_k"),
    ("1,025 hits", _retrieve(top_k=1_025), "retrieve.top_k"),
    ("a window below 0", _retrieve(window_before=-1), "retrieve.window_before"),
    ("65 neighbours before", _retrieve(window_before=65), "retrieve.window_before"),
    ("65 neighbours after", _retrieve(window_after=65), "retrieve.window_after"),
    ("an unknown array", _retrieve(arrays=["hidden"]), "retrieve.arrays"),
    ("an array twice", _retrieve(arrays=["key", "key"]), "retrieve.arrays"),
    ("a writer of 65", step(writer="w" * 65), "writer"),
    ("a writer with a line end", step(writer="w\n"), "writer"),
    ("payloads of a memory without", step(payloads=[pb.NamedTensor(name="hidden", tensor=tensor(KEYS))]), "payloads"),
    ("no keys", pb.StepRequest(memory="notes", sequences=[PART(sequence="a", num_rows=1)]), "keys"),
    ("keys of another width", step(keys=tensor(torch.zeros(1, 1, 5))), "keys.shape"),
    ("keys of two layers", step(keys=tensor(torch.zeros(2, 1, 4))), "keys.shape"),
    ("keys of a million extents", _keys(shape=[1] * 1_000_000), "keys.shape"),
    ("a million layers", step(layers=range(1_000_000)), "layers"),
    (
        "keys of so many elements that they overflow",
        step(keys=pb.Tensor(dtype=FP32, shape=[1 << 62, 4, 0])),
        "keys.shape",
    ),
    (
        "rows of so many elements that they overflow",
        pb.AppendRequest(
            memory="notes",
            sequences=[PART(sequence=str(i), num_rows=2**31 - 1) for i in range(4_096)],
            keys=pb.Tensor(dtype=FP32, shape=[1, 4_096 * (2**31 - 1), 4]),
        ),
        "keys.data",
    ),
    (
        "NaN in bfloat16",
        step(keys=pb.Tensor(dtype=pb.DATA_TYPE_BF16, shape=[1, 1, 4], data=b"\xc0\x7f" * 4)),
        "keys",
    ),
    ("a name of a payload that is a megabyte", step(payloads=[pb.NamedTensor(name="x" * (1 << 20))]), "payloads"),
    ("keys of nine extents", _keys(shape=[1] * 6), "keys.shape"),
    ("keys without dtype", step(keys=pb.Tensor(shape=[1, 1, 4], data=bytes(16))), "keys.dtype"),
    ("keys of an unknown dtype", _keys(dtype=99), "keys.dtype"),
    (
        "whole numbers as keys",
        step(keys=pb.Tensor(dtype=pb.DATA_TYPE_INT32, shape=[1, 1, 4], data=bytes(16))),
        "keys.dtype",
    ),
    ("keys without data", step(keys=pb.Tensor(dtype=FP32, shape=[1, 1, 4])), "keys.data"),
    ("too few bytes", _keys(data=bytes(15)), "keys.data"),
    ("too many bytes", _keys(data=bytes(20)), "keys.data"),
    ("keys by region over a network", _keys(region=pb.RegionSlice(plane=pb.PLANE_PROCESS, region=1)), "keys.data"),
    ("NaN", step(keys=_with(math.nan)), "keys"),
    ("infinity", step(keys=_with(math.inf)), "keys"),
    ("minus infinity", step(keys=_with(-math.inf)), "keys"),
    ("a key whose square overflows", step(keys=_with(1e18)), "keys"),
    (
        "a reply beyond a message",
        step(rows=3000, retrieve=pb.RetrieveOptions(top_k=1024, window_before=64, window_after=64)),
        "retrieve",
    ),
    ("known rows of two groups", _retrieve(known=[pb.KnownRows(), pb.KnownRows()]), "retrieve.known"),
    ("known rows from -1 on", _retrieve(known=[pb.KnownRows(begin=-1)]), "retrieve.known[0].begin"),
    ("known rows beyond 2^62", _retrieve(known=[pb.KnownRows(begin=2**62 + 1)]), "retrieve.known[0].begin"),
    ("a retrieval without options", pb.RetrieveRequest(memory="notes", sequences=[PART(sequence="a")]), "retrieve"),
    ("an append without keys", pb.AppendRequest(memory="notes", sequences=[PART(sequence="a")]), "keys"),
]

OTHERS: list[tuple[str, Message, str]] = [
    ("a creation without spec", pb.CreateMemoryRequest(), "spec"),
    ("a description of no name", pb.DescribeMemoryRequest(), "name"),
    ("a drop of no name", pb.DropMemoryRequest(), "name"),
    ("a reset of nothing", pb.ResetRequest(memory="notes"), "sequences"),
    ("a reset of one twice", pb.ResetRequest(memory="notes", sequences=["a", "a"]), "sequences"),
    ("a reset of an empty name", pb.ResetRequest(memory="notes", sequences=[""]), "sequences[0]"),
    ("a reset of 4,097", pb.ResetRequest(memory="notes", sequences=map(str, range(4_097))), "sequences"),
    ("a pin of nothing", pb.PinRequest(memory="notes"), "sequences"),
    ("a pin of one twice", pb.PinRequest(memory="notes", sequences=["a", "a"]), "sequences"),
    ("a pin of an empty name", pb.PinRequest(memory="notes", sequences=[""]), "sequences[0]"),
    ("a fork from nowhere", pb.ForkRequest(memory="notes", target="b"), "source"),
    ("a fork to nowhere", pb.ForkRequest(memory="notes", source="a"), "target"),
    ("a fork onto itself", pb.ForkRequest(memory="notes", source="a", target="a"), "target"),
    ("a fork as of -1", pb.ForkRequest(memory="notes", source="a", target="b", as_of=-1), "as_of"),
]
