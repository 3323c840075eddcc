"""What tensors take of the system, and give back, in a process of its own."""

import platform
import subprocess
import sys

import pytest


# Tensors of 8 MiB, with what lives on between them; freed after glibc has seen that blocks of 16 MiB are freed, too.
SCRIPT = """
import sys
import torch
from bridle_hf.common.heap import keep_large_tensors_out_of_the_heap

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

if sys.argv[1] == "kept out":
    keep_large_tensors_out_of_the_heap()
torch.ones(4 * 2**20)
before, lasting, large = resident(), [], []
for _ in range(20):
    large.append(torch.ones(2 * 2**20))
    lasting.append(torch.ones(2**16))
del large
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap")
def test_large_tensors_are_given_back_whatever_lives_on_between_them():
    taken = {
        how: float(subprocess.run([sys.executable, "-c", SCRIPT, how], check=True, stdout=subprocess.PIPE).stdout)
        for how in ("kept out", "as it is")
    }
    assert taken["kept out"] < 20 and taken["as it is"] > 100
