"""The page of a benchmark, a file for each part of it."""
