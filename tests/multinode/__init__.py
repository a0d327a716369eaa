"""Two hosts on one machine: laws that only hold between hosts."""
