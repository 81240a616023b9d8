"""Judging what came out."""
