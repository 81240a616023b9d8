"""Blind votes between pictures: what a vote is, what ratings follow from votes, and where they are kept."""
