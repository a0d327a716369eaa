"""From the SOURCE argument of a command to the source it names.

SOURCE              inputs                                             number
imagefolder:PATH    every file below PATH/CLASS/, by class, then path  place in the list
tars:PATH           members of tars, one tar per class, by tar         place in the list
parquet:PATH        rows of a file, a directory or a pattern, by file  row
table:FILE          rows of a CSV or Parquet of path and label         row
webdataset:PATH     samples of foreign WebDataset tars, by tar         place in the list
digits:train|eval|  the 1,797 scans of scikit-learn; every fifth one   index of the scan
                    belongs to eval, the others to train
"""

from collections.abc import Callable
from pathlib import Path

from data_pipeline.source import Source
from data_pipeline.sources.digits import DigitsSource
from data_pipeline.sources.folder import FolderSource
from data_pipeline.sources.parquet import ParquetSource
from data_pipeline.sources.table import TableSource
from data_pipeline.sources.tars import TarsSource
from data_pipeline.sources.webdataset import WebDatasetSource
from vitscale.base.errors import UsageError, nearest

_BY_PATH: dict[str, Callable[[str], Source]] = {
    "imagefolder": lambda rest: FolderSource(Path(rest).expanduser()),
    "tars": TarsSource,
    "parquet": lambda rest: ParquetSource(Path(rest).expanduser()),
    "table": lambda rest: TableSource(Path(rest).expanduser()),
    "webdataset": WebDatasetSource,
}
KINDS = (*_BY_PATH, "digits")


def open_source(spec: str) -> Source:
    """The source a SOURCE argument names. Raises UsageError for a wrong word, EnvironmentFault for a missing path."""
    kind, colon, rest = spec.partition(":")
    if not colon or kind not in KINDS:
        known = ", ".join(f"{name}:PATH" for name in _BY_PATH)
        raise UsageError(f"expected SOURCE as {known}, digits:train or digits:eval, got {spec!r}{nearest(kind, KINDS)}")
    if kind == "digits":
        return DigitsSource(rest)
    if not rest:
        raise UsageError(f"expected a path after {kind}:, got none")
    return _BY_PATH[kind](rest)
