"""Shared storage by address (``s3://bucket/folder``, ``gs://…``, ``file:///…``): push folders, pull and fetch them."""
