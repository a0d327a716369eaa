"""One module per kind of source, and `open_source`, which chooses among them."""
