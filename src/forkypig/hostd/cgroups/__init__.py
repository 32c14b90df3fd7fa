"""Control groups: limits, usage and freezing of a machine's processes, in version 1 and 2."""
