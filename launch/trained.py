"""Trained weights by the names people give them: RUN, RUN@STEP, or a file."""

import json
from pathlib import Path

from vitscale.base.errors import EnvironmentFault, UsageError
from vitscale.base.files import sha256_bytes, sha256_file
from vitscale.config import from_record
from vitscale.training.checkpoint import RECORD, newest_valid, verify
from vitscale.training.partitions import consolidate
from vitscale.training.rundir import CONFIG
from vitscale.weights.foreign import identity_of_foreign, is_foreign, load_any
from vitscale.weights.native import Weights

EMA_HELP = "a run's moving average instead of its weights; DECAY may be left out where the run keeps one"


def load_weights_of(text: str, *, ema: str | None = None) -> Weights:
    """Weights by name: RUN, RUN@STEP, a .safetensors file of launch/export.py, or weights of timm,
    Hugging Face (a directory) or JAX (an .npz).

    From a run, the newest checkpoint that verifies (or the named step) is put together in host memory; `ema` is the value of
    the flag --ema: the decay of the moving average to take instead of the weights, "" for the only one of the run.
    """
    if text.endswith(".safetensors") or is_foreign(Path(text)):
        if ema is not None:
            raise UsageError(f"{text} holds one set of weights; --ema needs a run, or leave it out")
        return load_any(Path(text))
    run, step_directory, record = find_trained(text)
    config = from_record(json.loads((run / CONFIG).read_text()), origin=str(run / CONFIG))
    decay = decay_of(ema, kept=config.train.ema, run=run) if ema is not None else None
    meta = {
        "source": str(run.resolve()),
        "step": str(record["state"]["step"]),
        "classes": json.dumps(record["data"]["classes"]),
        "eval_crop": str(config.augment.eval_crop),
        "objective": config.train.objective,
        "masked_classes": json.dumps(config.train.masked_classes),
    }
    if decay is not None:
        meta["ema"] = str(decay)
    return Weights(model=config.model, tensors=consolidate(step_directory, ema=decay), meta=meta)


def decay_of(text: str, *, kept: tuple[float, ...], run: Path) -> float:
    """The decay that --ema names, one of those the run kept; with nothing named, the only one. Raises UsageError."""
    if not kept:
        raise UsageError(f"{run} keeps no moving average (train.ema is empty); leave --ema out")
    choices = ", ".join(map(str, kept))
    if not text and len(kept) > 1:
        raise UsageError(f"{run} keeps several moving averages; name one: --ema with {choices}")
    found = [decay for decay in kept if not text or text == str(decay)]
    if not found:
        raise UsageError(f"{run} keeps no moving average with the decay {text}; it keeps {choices}")
    return found[0]


def identity_of(text: str) -> str:
    """A sha256 that stands for the weights `load_weights_of` would give: of the file, or of the checkpoint's record."""
    if is_foreign(Path(text)) and Path(text).exists():
        return identity_of_foreign(Path(text))
    if text.endswith(".safetensors"):
        if not Path(text).is_file():
            raise EnvironmentFault(f"expected weights at {text}, found no such file")
        return sha256_file(Path(text))
    _, step_directory, _ = find_trained(text)
    return sha256_bytes((step_directory / RECORD).read_bytes())


def find_trained(text: str) -> tuple[Path, Path, dict]:
    """(run, step directory, its record) of RUN or RUN@STEP."""
    name, at, step = text.partition("@")
    run = Path(name)
    if not (run / CONFIG).is_file():
        raise EnvironmentFault(
            f"expected a run directory, a .safetensors or .npz file, or a directory of timm or Hugging Face at {name}, "
            f"found no {CONFIG} there"
        )
    checkpoints = run / "checkpoints"
    if not at:
        return run, *newest_valid(checkpoints)
    if not step.isdigit():
        raise UsageError(f"expected RUN@STEP with a number behind @, got {text!r}")
    path = checkpoints / f"step-{int(step):08d}"
    complaint, record = verify(path)
    if complaint is not None:
        raise EnvironmentFault(f"{path} is not usable: {complaint}")
    return run, path, record
