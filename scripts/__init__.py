"""Command-line verbs, one a file."""
