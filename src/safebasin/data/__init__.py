"""Rows: files and built-in sets, read to one form. Nothing here imports torch."""
