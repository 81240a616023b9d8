"""The benchmarks of `scripts/bench.py`: a function each, and what they measure with."""
