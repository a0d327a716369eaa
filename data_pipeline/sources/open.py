"""From the SOURCE argument of a command to the source it names.

SOURCE              inputs                                             number
imagefolder:PATH    every file below PATH/CLASS/, by class, then path  place in the list
parquet:PATH        rows of a file, a directory or a pattern, by file  row
digits:train|eval|  the 1,797 scans of scikit-learn; every fifth one   index of the scan
                    belongs to eval, the others to train
"""

from pathlib import Path

from data_pipeline.source import Source
from data_pipeline.sources.digits import DigitsSource
from data_pipeline.sources.folder import FolderSource
from data_pipeline.sources.parquet import ParquetSource
from vitscale.base.errors import UsageError, nearest

KINDS = ("imagefolder", "parquet", "digits")


def open_source(spec: str) -> Source:
    """The source a SOURCE argument names. Raises UsageError for a wrong word, EnvironmentFault for a missing path."""
    kind, colon, rest = spec.partition(":")
    if not colon or kind not in KINDS:
        known = "imagefolder:PATH, parquet:PATH, digits:train or digits:eval"
        raise UsageError(f"expected SOURCE as {known}, got {spec!r}{nearest(kind, KINDS)}")
    if kind == "digits":
        return DigitsSource(rest)
    if not rest:
        raise UsageError(f"expected a path after {kind}:, got none")
    path = Path(rest).expanduser()
    return FolderSource(path) if kind == "imagefolder" else ParquetSource(path)
