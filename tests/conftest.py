"""What every test may ask for: one thread, a fixed seed, and the devices that are here."""

from __future__ import annotations

import pytest
import torch

from memstore.index import prepare


def pytest_sessionstart() -> None:
    """Search is compiled once, before the workers of pytest-xdist begin, and in no test's time."""
    prepare(torch.device("cpu"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20240702)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that is here; the others are skipped."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)
