"""A run: its final report, its page, and lists of runs."""
