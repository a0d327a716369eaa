"""Look at a dataset of shards: what is in it, whether it is whole, how it looks; and read tars that others have made."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.foreign import index_dataset
from data_pipeline.manifest import REJECTS, Manifest
from data_pipeline.places import find_tars
from data_pipeline.processes import default_workers
from data_pipeline.remote import open_dataset
from data_pipeline.sheet import Picture, rejected_pictures, shard_pictures
from data_pipeline.store import is_url
from data_pipeline.summary import as_record, described, tally_dataset
from data_pipeline.verify import verify_dataset
from launch.arguments import Parser
from vitscale.base.errors import EnvironmentFault, UsageError, run_main
from vitscale.base.files import write_json
from vitscale.insight.sheets import Cell, draw_sheet

SHEETS = 4
"""Shards that are drawn unless others are named."""

EPILOG = """\
info DIR       counts, images per class, sizes, formats, rejects, build options, fingerprint; reads the indices, no image
verify DIR     every file against the manifest, every image, key and label against the index; exit 3 names all damage
index SOURCE   make the WebDataset tars of others a dataset without rewriting them
sheet DIR      contact sheets: some images of each shard with keys and labels, and the rejected images

DIR may be a URL: s3://BUCKET/PREFIX, gs://, az://, https://. `inspect_shards.py ACTION --help` lists the options of each.
"""
INDEX_EPILOG = """\
SOURCE is a directory of tars, a pattern such as 'DIR/train-*.tar' or 'DIR/train-{000..146}.tar', or behind s3://, gs://,
https:// a prefix or names in braces. A sample is one image (jpg, jpeg, png, webp) and its label in KEY.cls or KEY.json.
Everything that cannot be used is named with its reason in OUT/rejects.parquet. The same command continues where an
earlier one ended; a tar whose size and time are as before is not read again.

Every byte of the tars is read once. Of the images only the headers are looked at; --full also decodes all pixels, which
takes about four times as long, and rejects what would otherwise be met in training.
"""


def main() -> None:
    actions = {"info": info, "verify": verify, "index": index, "sheet": sheet}
    parser = Parser(description=__doc__ or "", epilog=EPILOG)
    parser.add_argument("action", choices=tuple(actions))
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    actions[options.action](options.rest)


def info(words: list[str]) -> None:
    parser = _parser("info", "Say what is in a dataset, from its indices.")
    _add_dataset(parser)
    _add_workers(parser)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers to this file too")
    options = parser.parse_args(words)
    with opened(options.dataset) as manifest:
        tally = tally_dataset(manifest, workers=options.workers)
        print(described(manifest, tally))
    if options.json:
        write_json(options.json, as_record(manifest, tally))


def verify(words: list[str]) -> None:
    parser = _parser("verify", "Compare every byte of a dataset with its manifest and its indices.")
    _add_dataset(parser)
    _add_workers(parser)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what is damaged to this file too")
    options = parser.parse_args(words)
    with opened(options.dataset) as manifest:
        damage = verify_dataset(manifest, workers=options.workers)
    for line in damage:
        print(line)
    if options.json:
        write_json(options.json, {"fingerprint": manifest.fingerprint, "images": manifest.images, "damage": damage})
    if damage:
        raise EnvironmentFault(
            f"{options.dataset} is damaged in {len(damage):,} places, named above; restore those files from a copy or rebuild"
        )
    print(f"whole: {manifest.images:,} images in {len(manifest.shards):,} shards, fingerprint {manifest.fingerprint}")


def index(words: list[str]) -> None:
    parser = _parser("index", "Make the WebDataset tars of others a dataset, without rewriting them.", epilog=INDEX_EPILOG)
    parser.add_argument("source", metavar="SOURCE", help="directory, pattern or URL of the tars")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where the index goes (default: beside the tars)")
    parser.add_argument(
        "--classes", metavar="FILE", type=Path, help="class names, one per line: line i names label i (default: the numbers)"
    )
    parser.add_argument("--full", action="store_true", help="decode every image completely")
    parser.add_argument("--skip-damaged", action="store_true", help="leave out tars that are cut or damaged, as rejects")
    _add_workers(parser)
    options = parser.parse_args(words)
    if options.out is None and is_url(options.source):
        raise UsageError("expected --out DIR for tars on an object store; the index is kept in a directory of this machine")
    tars = find_tars(options.source)
    manifest = index_dataset(
        tars,
        out=options.out or Path(tars.at),
        classes=_class_names(options.classes) if options.classes else (),
        is_full=options.full,
        skip_damaged=options.skip_damaged,
        workers=options.workers,
    )
    print(_indexed(manifest))


def sheet(words: list[str]) -> None:
    parser = _parser("sheet", "Draw contact sheets: some images of each shard, evenly spaced, and the rejected images.")
    _add_dataset(parser)
    parser.add_argument("--out", metavar="DIR2", type=Path, required=True, help="directory of the PNG files, made if missing")
    parser.add_argument(
        "--shards", metavar="0,5", type=_numbers, help=f"numbers of the shards (default: the first {SHEETS}, as far as they go)"
    )
    parser.add_argument("--images", metavar="N", type=_count, default=48, help="images per sheet (default: %(default)s)")
    parser.add_argument(
        "--originals",
        metavar="DIR3",
        type=Path,
        help="directory of the inputs of the build, where they are files: to show those rejected",
    )
    options = parser.parse_args(words)
    with opened(options.dataset) as manifest:
        draw_sheets(manifest, options)


def draw_sheets(manifest: Manifest, options: argparse.Namespace) -> None:
    shards = options.shards or list(range(min(SHEETS, len(manifest.shards))))
    if max(shards) >= len(manifest.shards):
        raise UsageError(f"--shards: expected numbers below {len(manifest.shards)}, got {max(shards)}")
    for number in shards:
        shard = manifest.shards[number]
        pictures = shard_pictures(manifest, number, count=options.images)
        said = f"{len(pictures):,} of {shard.images:,} images" + (", evenly spaced" if len(pictures) < shard.images else "")
        subtitle = f"{said}; key, label and class; shard {number} of {len(manifest.shards):,} in {options.dataset}"
        _draw(options.out / f"{shard.name}.png", pictures, title=shard.name, subtitle=subtitle)
    if options.shards is None and len(manifest.shards) > len(shards):
        print(f"{len(manifest.shards) - len(shards):,} further shards were left out; name those you want with --shards")
    if manifest.rejected:
        pictures, total = rejected_pictures(manifest, count=options.images, originals=options.originals)
        hidden = sum(picture.image_HWC is None for picture in pictures)
        said = f"{len(pictures):,} of {total:,}" + (f"; of {hidden:,} there is nothing to see" if hidden else "")
        subtitle = f"{said}; source and reason; {options.dataset}"
        _draw(options.out / "rejects.png", pictures, title="rejected", subtitle=subtitle)
        if hidden and options.originals is None and "indexed_tars" not in manifest.build:
            print(f"{hidden:,} rejected images are shown by name only; --originals DIR3 tells where their files are")


def _draw(path: Path, pictures: list[Picture], *, title: str, subtitle: str) -> None:
    cells = [Cell(**vars(picture)) for picture in pictures]
    draw_sheet(path, cells, title=title, subtitle=subtitle)
    print(f"{path}: {len(cells)} images")


def _indexed(manifest: Manifest) -> str:
    rejected = sum(manifest.rejected.values())
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in manifest.rejected.items())
    labels = {0: "no labels", 1: f"{len(manifest.classes):,} classes"}.get(
        manifest.most_labels, f"{len(manifest.classes):,} classes, up to {manifest.most_labels} labels per image"
    )
    return "\n".join(
        [
            f"indexed     {manifest.images:,} of {manifest.images_read:,} samples in {len(manifest.shards):,} tars, {labels}",
            f"rejected    {rejected:,}" + (f" ({reasons}); named in {REJECTS}" if reasons else ""),
            f"dataset     {manifest.directory} (tars at {manifest.tars_at})",
            f"fingerprint {manifest.fingerprint}",
        ]
    )


def _class_names(path: Path) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--classes: expected a text file with one class name per line, got {path} ({error})") from None
    if not names or not all(names) or len(set(names)) < len(names):
        raise UsageError(f"--classes: expected one class name per line, each once and none empty, in {path}")
    return names


def _parser(action: str, description: str, epilog: str = "") -> Parser:
    return Parser(description=description, epilog=epilog, prog=f"{Path(sys.argv[0]).name} {action}")


def _add_dataset(parser: Parser) -> None:
    parser.add_argument("dataset", metavar="DIR", help="directory or URL of the dataset (holds manifest.json)")


@contextmanager
def opened(location: str) -> Iterator[Manifest]:
    """The manifest of a dataset; what is fetched of one on an object store is gone afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        yield open_dataset(location, cache_dir=Path(scratch))


def _add_workers(parser: Parser) -> None:
    parser.add_argument(
        "--workers", metavar="N", type=_count, default=default_workers(), help="processes (default here: %(default)s)"
    )


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--shards: expected numbers separated by commas, such as 0,5, got {text!r}")
    return [int(part) for part in parts]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"expected a whole number of at least 1, got {text!r}; see --help")
    return int(text)


if __name__ == "__main__":
    run_main(main)
