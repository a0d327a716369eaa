"""The samples of a tar as rows of an index: which member is the image, what its header and its labels say.

A sample is used when its key is new in the tar, and it has one image with a readable header and labels that make sense.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from data_pipeline.decode import BadImage, ImageHeader, decode_full, image_header
from data_pipeline.headers import jpeg_frame
from data_pipeline.jpeg import refuse_many_scans
from data_pipeline.places import ReadAt
from data_pipeline.tar_labels import LABEL_BYTES_MAX, BadLabel, label_ending, labels_of, marks_in
from data_pipeline.tars import Member, TarSample, key_and_ending, members, samples
from vitscale.base.files import xxh3_64

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
"""Of a sample with several of these the first is its image, as WebDataset's users write `jpg;png;webp`."""
IMAGE_BYTES_MAX = 64_000_000
PIXELS_MAX = 100_000_000


class Reject(NamedTuple):
    """What of a tar is no image of the dataset."""

    source: str
    reason: str
    detail: str


class Unusable(Exception):
    """A sample that cannot enter the dataset: `reason` for counting, `detail` for reading."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def contents_of(
    read_at: ReadAt, size: int, *, tar: str, classes: tuple[str, ...], is_full: bool
) -> tuple[list[dict[str, Any]], list[Reject]]:
    """Rows of INDEX_SCHEMA, and the rest, each in the order of the tar. Raises BadTar.

    `classes`: names of the labels; empty: labels are numbers. `is_full`: decode every image completely.
    """
    rows, rejects, keys = [], [], set[str]()
    number_of = {text: number for number, text in enumerate(classes)}
    for source, sample in _inputs(members(read_at, size)):
        try:
            if sample is None:
                raise Unusable("no-key", "the file name has no key and ending")
            if sample.key in keys:
                raise Unusable("duplicate-key", "the tar has this key before")
            keys.add(sample.key)
            rows.append(_row(read_at, sample, tar=tar, number_of=number_of, is_full=is_full))
        except Unusable as unusable:
            image = image_member(sample) if sample is not None else None
            rejects.append(Reject(f"{tar}:{image.name if image else source}", unusable.reason, unusable.detail))
    return rows, rejects


def _inputs(found: Iterator[Member]) -> Iterator[tuple[str, TarSample | None]]:
    """(name, sample) of everything in a tar; a member without a key stands alone, with None."""
    keyless: list[str] = []

    def noted() -> Iterator[Member]:
        for member in found:
            if key_and_ending(member.name) is None:
                keyless.append(member.name)
            yield member

    for sample in samples(noted()):
        yield from ((name, None) for name in keyless)
        keyless.clear()
        yield sample.key, sample
    yield from ((name, None) for name in keyless)


def _row(read_at: ReadAt, sample: TarSample, *, tar: str, number_of: Mapping[str, int], is_full: bool) -> dict[str, Any]:
    """The row of the index. Raises Unusable."""
    image = image_member(sample)
    if image is None:
        raise Unusable("no-image", f"expected one of {', '.join(IMAGE_ENDINGS)}, got {', '.join(list(sample.members)[:8])}")
    if image.size > IMAGE_BYTES_MAX:
        raise Unusable("too-many-bytes", f"{image.size:,} is more than {IMAGE_BYTES_MAX:,} bytes")
    content = read_at(image.offset, image.size)
    try:
        header = _checked_header(content, is_full=is_full)
        labels = sample_labels(read_at, sample, number_of=number_of)
    except BadImage as bad:
        raise Unusable(bad.reason, bad.detail) from None
    except BadLabel as bad:
        raise Unusable("bad-label", str(bad)) from None
    image_hash = xxh3_64(content)
    return {
        "key": sample.key,
        "image_offset": image.offset,
        "image_size": image.size,
        "label": labels[0] if labels else -1,
        "labels": labels,
        "width": header.width,
        "height": header.height,
        "orientation": header.orientation,
        "format": header.format,
        "image_xxh3": image_hash,
        "source": f"{tar}:{image.name}",
        "source_xxh3": image_hash,
    }


def image_member(sample: TarSample) -> Member | None:
    """The image of a sample: KEY.jpg and the like, else the only member that ends so (`KEY.v2.jpg`)."""
    for ending in IMAGE_ENDINGS:
        if ending in sample.members:
            return sample.members[ending]
    others = [member for ending, member in sample.members.items() if ending.rpartition(".")[2] in IMAGE_ENDINGS]
    return others[0] if len(others) == 1 else None


def sample_labels(read_at: ReadAt, sample: TarSample, *, number_of: Mapping[str, int]) -> list[int]:
    """The labels beside an image; `number_of`: see `labels_of`. Raises BadLabel."""
    ending = label_ending(sample.members)
    if ending is None:
        return []
    member = sample.members[ending]
    if member.size > LABEL_BYTES_MAX:
        raise BadLabel(f"{member.size:,} bytes of .{ending}")
    return labels_of(marks_in(read_at(member.offset, member.size), ending=ending), number_of=number_of)


def _checked_header(content: bytes, *, is_full: bool) -> ImageHeader:
    header = image_header(content)
    if header.format == "jpg":
        refuse_many_scans(content, jpeg_frame(content))
    if header.width * header.height > PIXELS_MAX:
        raise BadImage("too-many-pixels", f"{header.width} x {header.height} is more than {PIXELS_MAX} pixels")
    if is_full:
        decode_full(content, max_pixels=PIXELS_MAX)
    return header
