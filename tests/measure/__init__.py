"""Programs that measure and draw; their tests ask the same of less."""
