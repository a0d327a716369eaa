"""Thin scripts: parse, resolve, print what was derived, call."""
