"""Tests mirror the packages; `helpers` makes the data they need."""
