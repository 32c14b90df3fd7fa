"""The pager: serves the memory of snapshots as files, through FUSE. Small and fast, because machines fault on it.

    frozen      the memory of a frozen QEMU process, read without ever faulting into ourselves
    layers      layer files, and the table of who holds pages
    index       for each page of a snapshot, which layer holds it; index_file: the same on disk
    snapshot    one snapshot: its state, and reading it
    store       all snapshots: reserve, bind, settle, open, forget
    settling    own pages go to a layer file, by a process of its own (copier)
    prefetch    which pages a load touches, and pushing them ahead of the next one
    filesystem  the FUSE operations; mount: the mount itself; fuse_loop: pyfuse3 on asyncio
    service     gRPC; client: the same from hostd's side

No request waits for anything that could wait for a machine: reading a frozen process touches only pages that are its
own (frozen.py), layer files are read without blocking the event loop (layers.py), and whatever may block on a page lock
that we ourselves must release runs on another thread (prefetch.py).
"""
