"""Snapshots that travel: to and from a file, to and from an object store; and the store's own upkeep. All of it runs in
a process of its own that hostd starts (worker.py), so that a transfer neither slows nor endangers machines.
docs/sharing.md has the formats."""
