"""Engine, objective, optimizer, checkpoints, metrics and the loop."""
