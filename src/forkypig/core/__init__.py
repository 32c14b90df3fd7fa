"""Decisions without I/O and without a clock: what may be done, what things are called, what has to happen next."""
