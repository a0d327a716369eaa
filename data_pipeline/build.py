"""Raw images into WebDataset shards: list, scan, plan, write, and the manifest last (design.md 5.2).

Pieces of the scan and shards are dealt among the ranks and worker processes as they come to ask (team.py). The bytes of
every file follow from the source and the options alone, so any number of machines and workers, and any number of kills,
give the same dataset.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.config import BuildConfig
from data_pipeline.destination import Destination
from data_pipeline.exclude import Excluded
from data_pipeline.labels_file import mapped_classes, read_label_map
from data_pipeline.layout import PLAN, Layout, lay_out, read_layouts, rejects_path
from data_pipeline.listing import Listing, read_listing, renumbering, write_listing
from data_pipeline.manifest import MANIFEST, REJECTS, TIMM_INFO, Manifest, Shard, write_manifest
from data_pipeline.options import dataset_directory, options_of, split_names
from data_pipeline.processes import disk_faults, run_tasks
from data_pipeline.scan import ScanSetup, scan_inputs
from data_pipeline.source import Source
from data_pipeline.sources.open import open_source
from data_pipeline.team import Team
from data_pipeline.workshop import (
    BUILD,
    LIST,
    WORK,
    begin_or_continue,
    clear,
    finished_datasets,
    forget_files,
    holds_build,
    is_complete,
    tidy,
    withdraw,
)
from data_pipeline.write import Output, ShardTask, record_path, write_shard
from vitscale.base.errors import BadDataError, EnvironmentFault, TransientFault, UsageError, VitscaleError
from vitscale.base.files import fsync_path, read_json
from vitscale.base.progress import ImageBar

MOST_INPUTS = 10**9  # a key has nine digits
LATE_RANK_S = 60.0
"""A rank that never saw rank 0, and finds the dataset complete for so long, came when all was over."""


def build_dataset(config: BuildConfig, out: Path, *, workers: int, show_progress: bool = True) -> Manifest:
    """Build one dataset in this process and its workers; what build_datasets does for a configuration without splits."""
    assert config.split is None
    return build_datasets(config, out, workers=workers, show_progress=show_progress)[0]


def build_datasets(
    config: BuildConfig,
    out: Path,
    *,
    workers: int,
    team: Team | None = None,
    url: str | None = None,
    replan: bool = False,
    show_progress: bool = True,
) -> tuple[Manifest, ...]:
    """Build the datasets of all splits, continue a build that was interrupted, or return those that are complete.

    Called by every rank with equal arguments; `out` is a directory that all of them see. One worker means this process
    alone. `url`: the store that gets the dataset; `out` then keeps all but the tars. `replan`: delete what is there first.

    Raises UsageError when the options, the source or the directory do not fit, EnvironmentFault and TransientFault for
    files, disks and ranks that are gone, BadDataError when no image is good or `on_bad` says stop.
    """
    if not 0 <= config.seed < 2**64:
        raise UsageError(f"expected a seed from 0 to 2^64 - 1, got {config.seed}")
    team = team or Team()
    build = _Build(config, out, workers=workers, team=team, url=url, is_shown=show_progress and team.rank == 0)
    with disk_faults(out):
        if team.rank == 0:
            build.lead(replan=replan)
        else:
            build.join(replan=replan)
        finished = finished_datasets(config, out)
        assert finished is not None, "the build is complete"
        return finished


class _Build:
    """One rank of a build."""

    def __init__(self, config: BuildConfig, out: Path, *, workers: int, team: Team, url: str | None, is_shown: bool) -> None:
        self._config = config
        self._out = out
        self._work = out / WORK
        self._workers = workers
        self._team = team
        self._url = url
        self._is_shown = is_shown

    def lead(self, *, replan: bool) -> None:
        """Rank 0: list the inputs, let the other ranks join, and take part."""
        config, out = self._config, self._out
        options = options_of(config)
        if not (replan and holds_build(out)) and finished_datasets(config, out) is not None:
            tidy(out)
            return
        destinations = {split: self._destination(split) for split in split_names(config)}
        if replan:
            for split, destination in destinations.items():
                destination.forget(split)
        elif not (self._work / BUILD).exists() and all([there.take_over(options) for there in destinations.values()]):
            return
        source = open_source(config.source)
        is_mine = not out.exists()
        with self._team.leading(self._work, options) as let_join:
            if replan:
                forget_files(out)
            try:
                listing = write_listing(source, self._work / LIST)
                inputs = self._selected(listing)
            except UsageError:
                withdraw(out, is_mine=is_mine)
                raise
            begin_or_continue(config, out, listing)
            let_join()
            self._take_part(source, inputs, listed=len(listing))

    def join(self, *, replan: bool) -> None:
        """Another rank: take part as soon as rank 0 has listed the inputs."""
        began_at_s = time.monotonic()

        def is_over() -> bool:
            return is_complete(self._config, self._out) and (not replan or time.monotonic() - began_at_s > LATE_RANK_S)

        with self._team.joining(self._work, options_of(self._config), is_over=is_over) as is_in:
            if is_in:
                source = open_source(self._config.source)
                with self._under_other_hands():
                    listing = read_listing(self._work / LIST)
                    self._take_part(source, self._selected(listing), listed=len(listing))

    def _take_part(self, source: Source, inputs: Listing, *, listed: int) -> None:
        """Scan, plan, write and complete, as far as no other rank does."""
        with self._under_other_hands():
            if not (self._work / PLAN).exists():
                self._plan(source, inputs, listed)
            self._write(source, inputs)
            self._complete(inputs.classes)

    @contextmanager
    def _under_other_hands(self) -> Iterator[None]:
        """Another rank may complete the build and clear the workshop at any moment: then nothing is missing."""
        try:
            yield
        except (EnvironmentFault, TransientFault, FileNotFoundError) as error:
            if not self._is_complete():
                raise _loud(error) from None
        except VitscaleError as error:
            raise _loud(error) from None

    def _is_complete(self) -> bool:
        return is_complete(self._config, self._out)

    def _selected(self, inputs: Listing) -> Listing:
        """The inputs of the wanted classes."""
        config = self._config
        if inputs.numbers[-1] >= MOST_INPUTS:
            raise UsageError(
                f"expected at most {MOST_INPUTS:,} inputs, {config.source} lists {len(inputs):,}; split the source"
            )
        for flag, value in (("--per-class", config.per_class), ("--labels", config.labels), ("--classes", config.classes)):
            if value is not None and not (inputs.classes and inputs.most_labels):
                raise UsageError(f"{flag} needs classes, and {config.source} has no labels; drop {flag}")
        if config.labels is not None:
            classes, number_of = mapped_classes(inputs.classes, read_label_map(Path(config.labels)))
            if config.classes is not None:
                number_of = renumbering(classes, config.classes)[number_of]
            selected = inputs.renumbered(config.classes or classes, number_of)
        elif config.classes is not None:
            selected = inputs.narrowed(config.classes)
        else:
            return inputs
        if not len(selected):
            raise UsageError(f"{config.source} has no image of {', '.join(selected.classes[:5])}; name other classes")
        return selected

    def _plan(self, source: Source, inputs: Listing, listed: int) -> None:
        """Scan, and write the plan or wait for it."""
        config, work = self._config, self._work
        setup = ScanSetup(source=source, directory=work, config=config)
        excluded = Excluded(config.exclude)
        scan = scan_inputs(setup, inputs, excluded, team=self._team, workers=self._workers, is_shown=self._is_shown)
        if self._team.claim("plan"):
            try:
                lay_out(config, inputs, scan, excluded, work=work, listed=listed)
            except (BadDataError, UsageError):
                clear(self._out)  # nothing to continue: the next start must look at repaired images and other options
                raise
        self._team.wait_for_files([work / PLAN], is_over=self._is_complete)

    def _write(self, source: Source, inputs: Listing) -> None:
        layouts = read_layouts(self._work)
        for layout in layouts:
            self._destination(layout.split).directory.mkdir(parents=True, exist_ok=True)
        images = sum(layout.images for layout in layouts)
        with ImageBar(images=images, what="writing", is_shown=self._is_shown) as bar:
            output = Output(work=self._work, source=source)
            tasks = self._tasks(layouts, inputs, bar)
            for written in run_tasks(write_shard, output, tasks, workers=self._workers):
                self._team.report(written.name)
                bar.add(written.images, written.image_bytes)
        names = [name for layout in layouts for name in layout.shard_names()]
        self._team.wait_for_tasks(names, is_over=self._is_complete)

    def _tasks(self, layouts: list[Layout], inputs: Listing, bar: ImageBar) -> Iterator[ShardTask]:
        """The shards that nobody else writes."""
        for layout in layouts:
            for number, name in enumerate(layout.shard_names()):
                if not self._team.claim(name):
                    bar.add(layout.bounds[number + 1] - layout.bounds[number])
                    continue
                places = layout.places(self._work, number)
                rows = places["row"]
                yield ShardTask(
                    number=number,
                    name=name,
                    destination=self._destination(layout.split),
                    wanted=inputs.wanted(rows),
                    labels=inputs.labels[rows],
                    all_labels=inputs.labels_of(rows) if layout.most_labels > 1 else None,
                    places=places,
                )

    def _complete(self, classes: tuple[str, ...]) -> None:
        """Rejects, timm's list and the manifest of each split, in this order; then the workshop is cleared."""
        if not self._team.claim("manifest"):
            self._team.wait_for_tasks(["manifest"], is_over=self._is_complete)
            return
        infos = {}
        for layout in read_layouts(self._work):
            shards = [Shard(**read_json(record_path(self._work, name))) for name in layout.shard_names()]
            destination = self._destination(layout.split)
            destination.copy(rejects_path(self._work, layout.split), REJECTS)
            destination.write_json(TIMM_INFO, {"splits": {layout.split: _timm_split(layout, shards)}})
            infos[layout.split] = _timm_split(layout, shards, folder=f"{layout.split}/")
            destination.say_where()
            self._keep_manifest(layout, shards, classes)
        if self._config.split is not None:
            Destination(directory=self._out, url=self._url).write_json(TIMM_INFO, {"splits": infos})
        for layout in read_layouts(self._work):
            self._destination(layout.split).copy(self._kept(layout) / MANIFEST, MANIFEST)
        fsync_path(self._out)
        clear(self._out)

    def _keep_manifest(self, layout: Layout, shards: list[Shard], classes: tuple[str, ...]) -> None:
        """Write the manifest into the workshop, where it is none yet."""
        self._kept(layout).mkdir(exist_ok=True)
        write_manifest(
            self._kept(layout),
            shards=shards,
            classes=list(classes),
            most_labels=layout.most_labels,
            images_read=layout.images + sum(layout.rejected.values()),
            rejected=layout.rejected,
            build={
                "options": options_of(self._config),
                "split": None if self._config.split is None else layout.split,
                "plan_sha256": layout.plan_sha256,
                "left_out": layout.left_out,
                "exact_duplicates": layout.exact_duplicates,
            },
        )

    def _kept(self, layout: Layout) -> Path:
        return self._work / f"manifest-{layout.split}"

    def _destination(self, split: str) -> Destination:
        url = self._url if self._config.split is None or self._url is None else f"{self._url}/{split}"
        return Destination(directory=dataset_directory(self._config, self._out, split), url=url)


def _loud(error: Exception) -> Exception:
    """A rank that has joined meets what no other rank meets, so it must say it, whatever its number."""
    if isinstance(error, VitscaleError):
        error.every_rank_speaks = True
    return error


def _timm_split(layout: Layout, shards: list[Shard], *, folder: str = "") -> dict[str, Any]:
    """What timm wants to know of a split; `alt_label` names the member of KEY.json that holds the labels."""
    return {
        "name": layout.split,
        "num_samples": layout.images,
        "filenames": [f"{folder}{shard.name}.tar" for shard in shards],
        "shard_lengths": [shard.images for shard in shards],
    } | ({"alt_label": "labels"} if layout.most_labels > 1 else {})
