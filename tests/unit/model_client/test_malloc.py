"""malloc: with the option, what was freed is used again without page faults."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    import resource
    from model_client import MemoryClient

    client = MemoryClient("127.0.0.1:1"{option})

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        b"x" * (40 << 20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    print(faults())
"""


def faults(option: str) -> int:
    """Page faults of 40 MiB that are taken for the second time, in a process with such a client."""
    program = textwrap.dedent(PROGRAM).format(option=option)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=150, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_large_memory_is_taken_again_without_page_faults_where_that_is_asked_for() -> None:
    assert faults("") > 1_000
    assert faults(", tune_malloc=True") < 100
