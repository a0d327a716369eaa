"""Which program is this: the hash of our own source files and the versions beneath them, without importing torch."""

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("vitscale", "data_pipeline", "launch")
LIBRARIES = ("torch", "deepspeed")
ROOT = Path(__file__).resolve().parents[2]


def code_hash(root: Path = ROOT) -> str:
    """16 hex digits over names and contents of all our source files: equal code, equal hash, wherever it lies."""
    digest = hashlib.sha256()
    for path in sorted(file for package in PACKAGES for file in (root / package).rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def program_versions() -> dict[str, str]:
    """What has to be equal on all hosts of a run."""
    return {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}, "code": code_hash()}


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"
