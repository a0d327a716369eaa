"""Runs that are disturbed, and must end as if they had not been."""
