"""Measuring what the methods do: speed so far."""
