"""The client of memstore: torch tensors in, torch tensors out."""

from model_client.aio import AsyncMemoryClient, AsyncPendingStep, AsyncSession
from model_client.client import MemoryClient
from model_client.errors import MemstoreClientError
from model_client.session import PendingStep, Session
from model_client.stats import ClientStats
from model_client.wire import Hits, Retrieval, StepResult

__all__ = [
    "AsyncMemoryClient",
    "AsyncPendingStep",
    "AsyncSession",
    "ClientStats",
    "Hits",
    "MemoryClient",
    "MemstoreClientError",
    "PendingStep",
    "Retrieval",
    "Session",
    "StepResult",
]
