"""Small data sets and processes for tests."""
