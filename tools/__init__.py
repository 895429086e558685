"""Commands that measure, compare and explain: `python -m tools.NAME --help`."""
