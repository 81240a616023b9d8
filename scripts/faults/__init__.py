"""The trials of `scripts/torture.py`: one module a kind, each with a function that returns figures."""
