"""Memory for decoder models of transformers: attach one, train one, save what was learned."""

from integration.adapter import Adapter, load_adapter, save_adapter
from integration.attach import AttachedMemory, attach
from integration.config import ConfigError, MemoryConfig
from integration.errors import AttachError
from integration.families import UnknownFamily
from integration.trace import MemoryStats, ReadTrace
from integration.weights import MemoryWeights

__all__ = [
    "Adapter",
    "AttachError",
    "AttachedMemory",
    "ConfigError",
    "MemoryConfig",
    "MemoryStats",
    "MemoryWeights",
    "ReadTrace",
    "UnknownFamily",
    "attach",
    "load_adapter",
    "save_adapter",
]
