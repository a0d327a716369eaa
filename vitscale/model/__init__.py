"""The Vision Transformer of the seed mathematics."""
