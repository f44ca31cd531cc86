import platform
import subprocess
import sys

import pytest

from rt_detectron.utils.memory import keep_freed_memory

# New pages that the system hands out for ten blocks of 64 MB, each freed before the next.
COUNT = """
import resource, runpy, sys
import numpy as np
keep = runpy.run_path("rt_detectron/utils/memory.py")["keep_freed_memory"]  # the package takes seconds
if sys.argv[1] != "given back":
    assert keep()
if sys.argv[1] == "given back again":
    assert keep(False)
np.ones(2**23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps it")
def test_freed_memory_is_used_again():
    kept, given_back, again = (
        int(subprocess.check_output([sys.executable, "-c", COUNT, word]))
        for word in ("kept", "given back", "given back again")
    )
    assert kept < given_back / 10
    assert again > given_back / 2


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    assert keep_freed_memory() is False
