"""The benchmarks: `python -m bench`. One measured thing a module; docs/benchmarks.md says how each is measured."""
