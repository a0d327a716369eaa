"""Faults on purpose, against the whole program."""
