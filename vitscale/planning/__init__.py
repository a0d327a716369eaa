"""Memory, time and cadence in closed form."""
