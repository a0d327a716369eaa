"""Seeing what attention does."""
