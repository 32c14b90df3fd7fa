"""The chunk store: what snapshots consist of on disk. Compressed pages addressed by their hash, in packs; manifests
that name them; collecting what nothing names. A library without daemons: docs/format.md has every byte of it."""
