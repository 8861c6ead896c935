"""A memory that fails, is late or is gone: the model goes on as if it had none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from models import VOCABULARY, random_weights, tiny_config, tiny_model

from integration.attach import attach
from integration.config import ConfigError
from model_client import MemoryClient
from model_client.errors import (
    CircuitOpen,
    InvalidRequest,
    Late,
    MemstoreClientError,
    NotFound,
    Overloaded,
    Unavailable,
)

if TYPE_CHECKING:
    from torch import nn

SEGMENT = 16


class FailingStep:
    """A step that ends in an error."""

    def __init__(self, error: MemstoreClientError) -> None:
        self.error = error

    def result(self, timeout_s: float | None = None) -> Any:
        raise self.error


class FailingClient:
    """Answers create with the real client's answer, and steps with an error while `error` is set."""

    def __init__(self, client: MemoryClient, error: MemstoreClientError | None, *, at_once: bool) -> None:
        self.client = client
        self.error = error
        self.at_once = at_once
        self.created = 0

    def create_memory(self, *args: Any, **kwargs: Any) -> Any:
        self.created += 1
        return self.client.create_memory(*args, **kwargs)

    def reset(self, *args: Any, **kwargs: Any) -> Any:
        return self.client.reset(*args, **kwargs)

    def session(self, *args: Any) -> Any:
        self.inner = self.client.session(*args)
        return self

    def start_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.error is None:
            return self.inner.start_step(*args, **kwargs)
        if self.at_once:
            raise self.error
        return FailingStep(self.error)


def _text(segments: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, VOCABULARY, (1, 11), generator=generator).repeat(1, 9)[:, : segments * SEGMENT]


@torch.inference_mode()
def _logits(model: nn.Module, *, use_cache: bool = False) -> torch.Tensor:
    parts = _text().split(SEGMENT, dim=1)
    return torch.cat([model(input_ids=part, use_cache=use_cache).logits for part in parts], dim=1)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("error", [Unavailable("gone"), Late("slow"), Overloaded("full"), CircuitOpen("rest")])
def test_steps_that_fail_leave_the_bare_model(
    error: MemstoreClientError, at_once: bool, use_cache: bool, client: MemoryClient
) -> None:
    model = tiny_model("llama")
    config = tiny_config(model)
    bare = _logits(model)
    failing: Any = FailingClient(client, error, at_once=at_once)
    with attach(model, failing, config, random_weights(model, config)) as memory:
        assert torch.equal(_logits(model, use_cache=use_cache), bare)
        assert memory.stats.steps_without_memory == 3
        assert memory.stats.failures >= 3
        assert (memory.stats.late > 0) == isinstance(error, Late)
        memory.flush()
        assert memory.stats.lost_rows == 3 * SEGMENT
        failing.error = None
        again = _logits(model)
        assert memory.stats.steps_with_memory == 3
    assert not torch.allclose(again, bare, atol=1e-3)


def test_a_memory_that_the_server_lost_is_made_again(client: MemoryClient) -> None:
    model = tiny_model("llama")
    config = tiny_config(model)
    failing: Any = FailingClient(client, NotFound("lost"), at_once=False)
    with attach(model, failing, config, random_weights(model, config)) as memory:
        _logits(model)
        assert failing.created == 3
        failing.error = None
        _logits(model)
        assert memory.stats.steps_with_memory == 3
        client.drop_memory(config.memory)
        _logits(model)
        assert memory.stats.steps_without_memory == 3 + 1
        assert memory.stats.steps_with_memory == 3 + 2


def test_a_server_that_is_not_there_leaves_the_bare_model() -> None:
    model = tiny_model("llama")
    config = tiny_config(model)
    bare = _logits(model)
    with (
        MemoryClient("127.0.0.1:9", timeout_s=0.2, breaker_failures=1) as client,
        attach(model, client, config, random_weights(model, config)) as memory,
    ):
        assert torch.equal(_logits(model), bare)
        assert memory.stats.steps_without_memory == 3


def test_a_closed_client_leaves_the_bare_model() -> None:
    model = tiny_model("llama")
    config = tiny_config(model)
    bare = _logits(model)
    client = MemoryClient(":memory:", timeout_s=20.0)
    with attach(model, client, config, random_weights(model, config)) as memory:
        client.close()
        assert torch.equal(_logits(model), bare)
        assert memory.stats.failures > 0


def test_a_memory_of_another_shape_is_an_error(client: MemoryClient) -> None:
    model = tiny_model("llama")
    config = tiny_config(model)
    client.create_memory(config.memory, dim=config.dim + 8, capacity=config.capacity)
    with pytest.raises(ConfigError, match="exists with another shape"):
        attach(model, client, config).__enter__()
    with attach(model, client, config.with_changes(memory="another")):
        pass


def test_a_memory_that_the_server_refuses_is_an_error(client: MemoryClient) -> None:
    model = tiny_model("llama")
    with pytest.raises(InvalidRequest, match="name"):
        attach(model, client, tiny_config(model, memory="no such name!")).__enter__()
