"""Build small datasets and look at every byte of them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.build import build_datasets
from data_pipeline.config import BuildConfig
from data_pipeline.manifest import Manifest, read_table


def builds(out: Path, source: str, *, workers: int = 1, **options: Any) -> tuple[Manifest, ...]:
    """The datasets of all splits."""
    if "shard_images" in options:
        options["shard_bytes"] = None
    return build_datasets(BuildConfig(source=source, **options), out, workers=workers, show_progress=False)


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def rows_of(manifest: Manifest) -> dict[str, np.ndarray]:
    """All rows of all indices."""
    tables = [read_table(manifest.directory / f"{shard.name}.parquet") for shard in manifest.shards]
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def photograph(number: int, *, height: int = 24, width: int = 32, kind: str = "JPEG", orientation: int = 1) -> bytes:
    """A smooth picture, different for every number."""
    coarse = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95, "exif": exif} if kind == "JPEG" else {}))
    return buffer.getvalue()


def write_folder(root: Path, contents: dict[str, bytes]) -> Path:
    """Files by their path below root."""
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root
