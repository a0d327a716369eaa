"""Stand-in."""

from pathlib import Path

from vitscale.weights.native import Weights, load_weights


def load_weights_of(text: str) -> Weights:
    return load_weights(Path(text))
