"""Tensors as bytes and back, and what a memory may be."""

from __future__ import annotations

import pytest
import torch

from memstore.v1 import memstore_pb2 as pb
from model_client import MemoryClient, Retrieval, errors, wire

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4), (0, 4), (5,)])
def test_a_tensor_comes_back_as_it_was(dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    tensor = torch.randint(0, 100, shape).to(device, dtype)
    message = pb.Tensor()
    wire.InlinePlane().write(tensor, message)
    assert len(message.data) == tensor.numel() * tensor.element_size()
    back = wire.InlinePlane().read(message, device)
    assert back.device.type == device.type
    assert back.dtype == dtype
    assert torch.equal(back, tensor)
    back.zero_()  # it is the caller's own


def test_strides_and_gradients_do_not_travel() -> None:
    tensor = torch.randn(4, 6, requires_grad=True).t()[::2]
    message = pb.Tensor()
    wire.InlinePlane().write(tensor, message)
    assert torch.equal(wire.InlinePlane().read(message, CPU), tensor.detach())


@pytest.mark.parametrize(
    "message",
    [
        pb.Tensor(dtype=pb.DATA_TYPE_FP32, shape=[2], data=b"1234"),
        pb.Tensor(dtype=pb.DATA_TYPE_FP32, shape=[1], data=b"123"),
        pb.Tensor(shape=[1], data=b"1"),
        pb.Tensor(dtype=pb.DATA_TYPE_FP32, shape=[3]),
        pb.Tensor(dtype=pb.DATA_TYPE_FP32, shape=[-1, -1], data=b"1234"),
        pb.Tensor(dtype=pb.DATA_TYPE_FP32, shape=[-1, 0]),
        pb.Tensor(dtype=pb.DATA_TYPE_FP32, shape=[1 << 40, 1 << 40, 0]),
    ],
)
def test_a_malformed_reply_is_the_servers_fault(message: pb.Tensor) -> None:
    with pytest.raises(errors.Internal):
        wire.InlinePlane().read(message, CPU)


def test_a_dtype_that_does_not_travel_is_refused() -> None:
    with pytest.raises(errors.InvalidRequest, match="float64"):
        wire.InlinePlane().write(torch.zeros(1, dtype=torch.float64), pb.Tensor())


def test_a_memory_spec() -> None:
    spec = wire.memory_spec(
        "m",
        {
            "dim": 4,
            "capacity": 8,
            "dtype": torch.bfloat16,
            "metric": "cosine",
            "index": "faiss_ivf_pq",
            "index_settings": {"nprobe": 7, "pq_m": 2},
            "payloads": {"hidden": (torch.float32, (2, 3))},
            "tags": {"a": "b"},
        },
    )
    assert (spec.max_sequences, spec.num_layers, spec.dtype) == (1, 1, pb.DATA_TYPE_BF16)
    assert (spec.metric, spec.index) == (pb.METRIC_COSINE, pb.INDEX_KIND_FAISS_IVF_PQ)
    assert spec.index_settings == pb.IndexSettings(nprobe=7, pq_m=2)
    assert (spec.payloads[0].name, list(spec.payloads[0].shape)) == ("hidden", [2, 3])
    assert dict(spec.tags) == {"a": "b"}


@pytest.mark.parametrize(
    "options", [{"metric": "l1"}, {"index": "tree"}, {"dtype": torch.float64}, {"index_settings": {"probes": 1}}]
)
def test_unknown_words_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(errors.InvalidRequest):
        wire.memory_spec("m", {"dim": 1, "capacity": 1, **options})  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dim": 1, "capacity": 1, "max_sequence": 8}, "max_sequence: .* none of .*max_sequences"),
        ({"dim": 1}, "capacity: needed"),
        ({"dim": 1, "capacity": 1, "dtype": "fp64"}, "dtype: fp64 .*float16"),
        ({"dim": 1, "capacity": 1, "host_spilled_sequences": 1}, "host_spilled_sequences: .* max_spilled_sequences"),
    ],
)
def test_options_that_are_misspelt_or_missing_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=named):
        wire.memory_spec("m", options)  # type: ignore[arg-type]


def test_a_client_is_given_no_option_that_it_does_not_know() -> None:
    with pytest.raises(errors.InvalidRequest, match=r"timeout: .* none of .*timeout_s"):
        MemoryClient(":memory:", timeout=3)  # type: ignore[call-arg]


def test_retrieve_options() -> None:
    options = wire.retrieve_options(Retrieval(3, before=1, after=2, arrays=("key", "hidden"), scores=False))
    assert options == pb.RetrieveOptions(
        top_k=3, window_before=1, window_after=2, arrays=["key", "hidden"], omit_scores=True
    )
