"""Does the memory of a process that streams stay flat? Two epochs of a fabricated dataset of 10 million images.

    python -m tests.measure.memory_of_order [--figure FILE.png]

Every position of the order is computed, every index is read, and every 4th sample (--read-every) goes through LocalStorage.
The images have no bytes, so nothing but the order, the indexes and the open files is in memory; all shards have the same
index under their own names.
"""

import argparse
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.loader import mixture_of
from data_pipeline.manifest import INDEX_SCHEMA, Manifest, Shard, write_manifest, write_table
from data_pipeline.storage import LocalStorage
from vitscale.base.files import sha256_file, xxh3_64

GLOBAL_BATCH = 4096
MEASURE_EVERY_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Resident memory of this process along two epochs."""

    epochs: np.ndarray
    """Images seen / images of the dataset, at each measurement."""
    resident_bytes: np.ndarray
    elapsed_s: float

    @property
    def growth_bytes(self) -> int:
        """How much more the second epoch needed than the first."""
        return int(self.resident_bytes[self.epochs > 1].max() - self.resident_bytes[self.epochs <= 1].max())


def fabricate(directory: Path, *, shards: int, rows: int) -> Manifest:
    """A dataset without images: empty tars, and one index under the name of every shard."""
    columns = {
        "key": [f"{row:09d}" for row in range(rows)],
        "image_offset": np.zeros(rows, np.int64),
        "image_size": np.zeros(rows, np.int64),
        "label": np.zeros(rows, np.int32),
        "labels": [None] * rows,
        "width": np.full(rows, 256, np.int32),
        "height": np.full(rows, 256, np.int32),
        "orientation": np.ones(rows, np.int8),
        "format": ["jpg"] * rows,
        "image_xxh3": np.full(rows, xxh3_64(b""), np.uint64),
        "source": [f"image-{row:09d}.jpg" for row in range(rows)],
        "source_xxh3": np.random.default_rng(0).integers(0, 2**64, rows, dtype=np.uint64),
    }
    first = directory / "train-000000.parquet"
    write_table(first, columns, schema=INDEX_SCHEMA)
    sha256 = sha256_file(first)
    names = [f"train-{number:06d}" for number in range(shards)]
    for name in names:
        (directory / f"{name}.tar").touch()
        if name != first.stem:
            os.link(first, directory / f"{name}.parquet")
    records = [Shard(name=name, images=rows, tar_bytes=0, tar_sha256="", index_sha256=sha256) for name in names]
    return write_manifest(directory, shards=records, classes=["0"], images_read=shards * rows, rejected={}, build={})


def measure(manifest: Manifest, *, read_every: int) -> Memory:
    """Stream two epochs and look at the memory now and then."""
    mixture, storage = mixture_of([manifest], data=DataConfig(), seed=0), LocalStorage(manifest)
    steps = 2 * manifest.images // GLOBAL_BATCH
    seen, resident = [], []
    started_at_s = time.perf_counter()
    for step in range(steps):
        _, samples = mixture.samples_at(mixture.slots_of_step(step * GLOBAL_BATCH, GLOBAL_BATCH))
        for shard, row in zip(samples.shard[::read_every].tolist(), samples.index[::read_every].tolist(), strict=True):
            storage.read(shard, row)
        if step % MEASURE_EVERY_STEPS == 0:
            seen.append((step + 1) * GLOBAL_BATCH / manifest.images)
            resident.append(resident_bytes())
    elapsed_s = time.perf_counter() - started_at_s
    storage.close()
    return Memory(epochs=np.array(seen), resident_bytes=np.array(resident), elapsed_s=elapsed_s)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def draw(memory: Memory, images: int, to: Path) -> None:
    """Memory over epochs, from zero, so that flat looks flat and growth like growth."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.plot(memory.epochs, memory.resident_bytes / 1e6, color="#1f5fa8", linewidth=1.5)
    axes.axvline(1, color="#999999", linewidth=0.8, linestyle=":")
    axes.set(xlim=(0, 2), ylim=(0, 1.2 * memory.resident_bytes.max() / 1e6), xlabel="epochs", ylabel="resident memory, MB")
    axes.set_title(f"One process streaming {images:,} images: order, indexes, open files", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(to, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=10_000, help="images per shard")
    parser.add_argument("--read-every", type=int, default=4, metavar="N", help="every n-th sample goes through the storage")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        manifest = fabricate(Path(place), shards=options.shards, rows=options.rows)
        before = resident_bytes()
        memory = measure(manifest, read_every=options.read_every)
    peak = [memory.resident_bytes[part].max() / 1e6 for part in (memory.epochs <= 1, memory.epochs > 1)]
    print(
        f"{manifest.images:,} images: {before / 1e6:.0f} MB before the first step, at most {peak[0]:.1f} MB in the first epoch "
        f"and {peak[1]:.1f} MB in the second ({memory.growth_bytes / 1e6:+.1f} MB); {memory.elapsed_s:.0f} s"
    )
    if options.figure:
        draw(memory, manifest.images, options.figure)


if __name__ == "__main__":
    main()
