"""The per-host daemon: it drives QEMU, performs splits and owns the host's disks and processes.

Knows machines by id, not whom they belong to. QEMU processes and the pager outlive it; it adopts them again.
"""
