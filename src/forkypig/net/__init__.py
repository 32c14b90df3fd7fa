"""The host's network for machines: namespaces, taps, the bridge, nftables, names. Knows nothing of QEMU."""
