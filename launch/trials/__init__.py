"""Trainings that are struck on purpose, again and again, and the proof that it left no trace: the parts of chaos.py."""
