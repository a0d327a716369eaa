"""Small images, and the list of a source, without a build."""

from pathlib import Path

import numpy as np

from data_pipeline.listing import Listing, write_listing
from data_pipeline.source import Source, Unusable, Wanted
from data_pipeline.sources.open import open_source


def digit_pngs(count: int) -> list[bytes]:
    """Different small images."""
    wanted = Wanted(numbers=np.arange(count), names=[""] * count, places=None)
    return [content for content in open_source("digits:").read(wanted) if isinstance(content, bytes)]


def names_of(listing: Listing) -> list[str]:
    return listing.names_of(np.arange(len(listing)))


def listed_and_read(source: Source, directory: Path) -> tuple[Listing, list[bytes | str]]:
    """The list, and for every input its bytes, or the reason why there are none."""
    listing = write_listing(source, directory)
    contents: list[bytes | str] = []
    for group in np.unique(listing.groups):
        found = source.read(listing.wanted(np.flatnonzero(listing.groups == group)))
        contents += [content.reason if isinstance(content, Unusable) else content for content in found]
    return listing, contents
