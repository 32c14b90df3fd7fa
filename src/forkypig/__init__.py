"""Forky Pig forks running virtual machines the way a kernel forks processes."""
