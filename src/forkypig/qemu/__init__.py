"""Everything that knows QEMU: its command line, process, QMP session, disks, and the steps of a split.

Driven by hostd alone; knows nothing of names, tenants or gRPC.
"""
