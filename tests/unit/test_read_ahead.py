"""The advice for huge pages is taken away from what we start, and nothing else is."""

import subprocess
import sys

_LOOK = """
import mmap, subprocess, sys
sys.path[:0] = {path!r}
if {filtered}:
    from forkypig.qemu.read_ahead import ignore_huge_page_advice
    ignore_huge_page_advice()
code = '''
import mmap
memory = mmap.mmap(-1, 8 << 20)
memory.madvise(mmap.MADV_HUGEPAGE)
memory.madvise(mmap.MADV_DONTFORK)
flags = [line.split() for line in open("/proc/self/smaps") if line.startswith("VmFlags")]
print(any("hg" in found for found in flags), any("dc" in found for found in flags))
'''
sys.exit(subprocess.run([sys.executable, "-c", code]).returncode)
"""


def _flags(*, filtered: bool) -> str:
    code = _LOOK.format(path=sys.path, filtered=filtered)
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_children_of_ours_ask_for_huge_pages_in_vain() -> None:
    assert _flags(filtered=False) == "True True"
    assert _flags(filtered=True) == "False True"
