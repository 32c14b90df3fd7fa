"""The pager: serves memory, disks and device state of snapshots as files, through FUSE. Machines fault on it.

    The holder has the FUSE connection. It looks references up, reads frozen processes, and hands over the rest:

    frozen      the memory of a frozen QEMU process, read without ever faulting into ourselves; layers: their table
    index       for each page of a file, where it is; upkeep: completing indexes, and replacing frozen layers
    snapshot    one snapshot: its state and its files (served); catalogue: all of them
    content     reading files: frozen pages here and now, all else by the reader (reader_link)
    starts      what machines touch when they start, and pushing it ahead of the next time (prefetch)
    packing     follows the packer (packer_link); shelf: packed snapshots as they lie in the store
    filesystem  the FUSE operations; mount: the mount itself; fuse_loop: pyfuse3 on asyncio
    service     gRPC; client: the same from hostd's side; order: what a packing needs to know; cache: pages in memory

    Two programs do what can fail or take time, so that they can die: their deaths cost a delay.

    reader      decompresses and verifies pages of the store and of base images
    packer      makes snapshots durable in the store, at the lowest priority (pack_job); disk_packer, disk_stack: disks

No request waits for anything that could wait for a machine: reading a frozen process touches only pages that are its
own (frozen.py), and whatever may block on a page lock that we ourselves must release runs on another thread (starts).
"""
