import os
import subprocess
import sys

from rayrl.report.memory import PeakMemory, memory_of_tree

MIB = 1 << 20
CHILD = "import sys; b = bytearray(64 << 20); print('ready', flush=True); sys.stdin.read()"


def test_children_are_counted() -> None:
    before = memory_of_tree(os.getpid())
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child, PeakMemory(every_s=0.01) as memory:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        during = memory_of_tree(os.getpid())
        assert child.stdin is not None
        child.stdin.close()
    assert during - before > 60 * MIB
    assert memory.peak > 0
    assert memory_of_tree(os.getpid()) < during - 50 * MIB


def test_a_short_block_has_a_peak() -> None:
    with PeakMemory(every_s=60.0) as memory:
        assert memory.peak > MIB


def test_a_process_that_is_gone_has_none() -> None:
    assert memory_of_tree(2**22 + 1) == 0
