"""The parts of scripts/sweep.py: what is varied, what a trial is, who runs it, and the page about it."""
