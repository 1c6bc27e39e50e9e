"""Measuring what the methods do: quality, bytes and speed. `python -m nanokv.eval --help`"""
