"""The gate in front of a stream: lists of positions pass, in order, once the shards they need lie in the cache.

list      the positions of one micro-batch
entry     a shard in the cache (cache.py), named by its key
horizon   lists that are read ahead of the one that passes next: cheap integers, and they say which entries are needed when
due       entries of the lists that may be in work and of those of the next step, as many lists at the start as later

The gate stands in the main process of a rank; a few threads fetch, and the data workers, which are forked, only ever see
finished files. An error of a thread comes out of the gate at the next list.
"""

import itertools
import math
import os
import signal
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_pipeline.cache import Answer, Cache, CacheTooSmall, Part
from data_pipeline.entries import Entries
from data_pipeline.eviction import Need, UsesOf
from data_pipeline.manifest import Manifest
from data_pipeline.patience import PATIENCE, Patience, Stopped
from vitscale.base.errors import EnvironmentFault, HostFault, TransientFault

THREADS = 4
HORIZON_LISTS = 2048
READ_AT_FIRST = 64
READ_AHEAD_PER_LIST = 4
"""Lists read ahead for each that passes, until the horizon is reached; more while one waits."""
LONG_WAIT_S = 5.0
CLOSE_S = 1.0

ShardsOf = Callable[[list[int]], Iterable[tuple[int, int]]]
"""List of positions to (number of the dataset, number of the shard) of all that reading it may touch."""


@dataclass(kw_only=True)
class Counts:
    """What the gate has done so far."""

    lists: int = 0
    lists_waited: int = 0
    waited_s: float = 0.0
    fetched: int = 0
    """Entries."""
    fetched_bytes: int = 0
    """Bytes received, those of damaged copies included."""
    evicted: int = 0
    """Entries this rank has evicted."""


class Fetcher:
    """Fetches the shards of datasets on stores ahead of their use. For one stream; datasets on disks pass untouched.

    `outstanding`: lists that may have passed without being finished. `step_lists`: lists this rank needs for one step;
    the cache must hold them together, for else every step would fetch everything again.
    """

    def __init__(
        self,
        manifests: Sequence[Manifest],
        *,
        cache_dir: Path,
        cache_bytes: int,
        outstanding: int,
        step_lists: int = 1,
        threads: int = THREADS,
        horizon_lists: int = HORIZON_LISTS,
        patience: Patience = PATIENCE,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.counts = Counts()
        self._entries = Entries(manifests, cache_dir=cache_dir, patience=patience)
        self._cache_dir, self._cache_bytes = cache_dir, cache_bytes
        self._due_lists = outstanding - 1 + step_lists
        self._horizon_lists = max(horizon_lists, self._due_lists)
        self._patience, self._say, self._n_threads = patience, say, threads

        self._state = threading.Condition()
        self._stop = threading.Event()
        self._ahead: deque[tuple[list[int], tuple[str, ...]]] = deque()
        self._recent: deque[tuple[str, ...]] = deque(maxlen=outstanding - 1)
        """Lists that may still be in work when the next one passes."""
        self._uses: dict[str, list[int]] = {}
        """Numbers of the lists within the horizon that need an entry."""
        self._passed = 0
        """Lists that have passed: the number of the next one."""
        self._read = 0
        self._ready: set[str] = set()
        """There and verified."""
        self._at_work: set[str] = set()
        self._not_before_s: dict[str, float] = {}
        self._busy_since_s: dict[str, float] = {}
        self._paused = (-1, 0.0)
        self._due: set[str] = set()
        self._published: tuple[set[str], set[str]] = (set(), set())
        self._sizes: dict[str, int] = {}
        """As published."""
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def follow(self, lists: Iterable[list[int]], shards_of: ShardsOf) -> Iterator[list[int]]:
        """`lists` themselves, each once what it needs is there. The threads live as long as this generator.

        Raises CacheTooSmall, HostFault for what is missing, refused or damaged, TransientFault past a deadline.
        """
        coming = iter(lists)
        try:
            self._read_ahead(coming, shards_of, READ_AT_FIRST)
            self._start()
            while True:
                self._read_ahead(coming, shards_of, READ_AHEAD_PER_LIST)
                if not self._ahead:
                    return
                if not self._wait_for_next(coming, shards_of):
                    return
                yield self._pass_next()
        finally:
            self.close()

    def close(self) -> None:
        """End the threads and need nothing any more. Safe to call twice, and in a forked child, where it does nothing."""
        if not self._threads or os.getpid() != self._pid:
            return
        self._stop.set()
        with self._state:
            threads, self._threads = self._threads, []
            self._state.notify_all()
        give_up_at_s = time.monotonic() + CLOSE_S
        for thread in threads:
            thread.join(max(0.0, give_up_at_s - time.monotonic()))  # one that waits for a silent store ends by itself
        if threads:
            self._cache.close()

    # ---- the gate, in the main thread -------------------------------------------------------------------------------

    def _start(self) -> None:
        # The cache is opened here, behind the fork of the data workers: they shall not hold its locks.
        self._pid = os.getpid()
        self._started_at_s = time.time()
        self._cache = Cache(self._cache_dir, limit_bytes=self._cache_bytes)
        self._threads = [threading.Thread(target=self._work, daemon=True, name=f"fetch-{i}") for i in range(self._n_threads)]
        # Signals are for the main thread: one that lands elsewhere would not interrupt what the main thread waits for.
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
        try:
            for thread in self._threads:
                thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)

    def _read_ahead(self, coming: Iterator[list[int]], shards_of: ShardsOf, count: int) -> bool:
        """Read up to `count` lists more, and at least those that are due; False: there is nothing to read."""
        begun = self._read
        while self._read - begun < count or len(self._ahead) < self._due_lists:
            if len(self._ahead) >= self._horizon_lists:
                break
            numbers = next(coming, None)
            if numbers is None:
                break
            found = [self._entries.key_of(*place) for place in shards_of(numbers)]
            keys = tuple(dict.fromkeys(key for key in found if key is not None))
            with self._state:
                for key in keys:
                    self._uses.setdefault(key, []).append(self._read)
                self._ahead.append((numbers, keys))
                self._read += 1
        return self._read > begun

    def _wait_for_next(self, coming: Iterator[list[int]], shards_of: ShardsOf) -> bool:
        """False: the gate was closed meanwhile."""
        asked_at_s = time.monotonic()
        is_waiting = False
        while True:
            self._publish()
            with self._state:
                if self._error is not None:
                    raise self._error
                if self._stop.is_set():
                    return False
                missing = [key for key in self._ahead[0][1] if key not in self._ready]
                if not missing:
                    break
                self._state.notify_all()
            is_waiting = True
            if not self._read_ahead(coming, shards_of, READ_AHEAD_PER_LIST):
                with self._state:
                    self._state.wait(0.05)
        if is_waiting:
            waited_s = time.monotonic() - asked_at_s
            self.counts.lists_waited += 1
            self.counts.waited_s += waited_s
            if self._say is not None and waited_s > LONG_WAIT_S:
                self._say(
                    f"micro-batch {self._passed} of this rank waited {waited_s:.1f} s for its shards "
                    f"({self._entries.fetched_bytes / 1e9:.2f} GB fetched, {self.counts.evicted} shards evicted so far)"
                )
        return True

    def _pass_next(self) -> list[int]:
        with self._state:
            numbers, keys = self._ahead.popleft()
            gone = [*self._recent, keys][0] if len(self._recent) == self._recent.maxlen else ()
            self._recent.append(keys)
            for key in keys:
                del self._uses[key][0]
                if not self._uses[key]:
                    del self._uses[key]
            self._passed += 1
            released = [key for key in gone if key not in self._uses and all(key not in recent for recent in self._recent)]
        for key in released:
            self._cache.touch(key)
        self.counts.lists += 1
        self.counts.fetched_bytes = self._entries.fetched_bytes
        return numbers

    def _publish(self) -> None:
        """Tell the other ranks when what is due or known to be needed has changed."""
        with self._state:
            coming = [keys for _, keys in itertools.islice(self._ahead, self._due_lists - len(self._recent))]
            due = {key for keys in (*self._recent, *coming) for key in keys}
            current = (due, due | self._uses.keys())
            if current == self._published:
                return
            distances = {key: self._distance(key, due) for key in current[1]}
        try:
            there = self._publish_needs(distances)
        except CacheTooSmall:
            # A guess is no reason to refuse, also one that a thread has replaced by the size meanwhile.
            if all(self._sizes[key] == self._entries.size(key) and not self._entries.is_guessed(key) for key in due):
                raise
            try:
                for key in due:
                    self._entries.sizes(key)
            except EnvironmentFault as error:
                raise HostFault(str(error)) from None
            there = self._publish_needs(distances)
        with self._state:
            self._published, self._due = current, due
            self._ready &= there
            self._state.notify_all()

    def _publish_needs(self, distances: dict[str, int]) -> set[str]:
        needs = {key: Need(distance=distance, size=self._entries.size(key)) for key, distance in distances.items()}
        self._sizes = {key: need.size for key, need in needs.items()}
        return self._cache.publish(needs, uses_of=partial(self._uses_of, self._passed))

    def _distance(self, key: str, due: set[str]) -> int:
        return 0 if key in due else max(1, self._uses[key][0] - self._passed)

    # ---- the threads --------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._stop.is_set():
            with self._state:
                job = self._next_job()
                if job is None:
                    self._state.wait(0.05)
                    continue
                key, distance = job
                self._at_work.add(key)
                uses_of = partial(self._uses_of, self._passed)
            try:
                answer = self._provide(key, distance, uses_of)
                with self._state:
                    self._at_work.discard(key)
                    self._note(key, distance, answer)
                    self._state.notify_all()
            except Stopped:
                return
            except BaseException as error:
                self._fail(error)
                return

    def _next_job(self) -> tuple[str, int] | None:
        """The entry that is needed soonest and that nobody provides as yet."""
        now_s = time.monotonic()
        is_paused = self._paused[0] == self._passed and now_s < self._paused[1]
        wanted = [key for key in self._uses if key not in self._ready and key not in self._at_work]
        for key in sorted(wanted, key=lambda key: (self._distance(key, self._due), self._uses[key][0])):
            if self._not_before_s.get(key, 0.0) <= now_s:
                distance = self._distance(key, self._due)
                return (key, distance) if not distance or not is_paused else None
        return None

    def _note(self, key: str, distance: int, answer: Answer) -> None:
        evicted = self._cache.evicted[self.counts.evicted :]
        self.counts.evicted += len(evicted)
        self._ready.difference_update(evicted)
        if answer == "whole":
            self._ready.add(key)
            self._busy_since_s.pop(key, None)
            return
        now_s = time.monotonic()
        self._not_before_s[key] = now_s + 0.05
        if answer == "full" and distance:
            self._paused = (self._passed, now_s + 0.5)  # what is needed later would find no room either
        if answer == "busy":
            limit_s = self._patience.deadline_s + self._entries.size(key) / self._patience.slow_bytes_per_s
            if now_s - self._busy_since_s.setdefault(key, now_s) > limit_s:
                raise TransientFault(
                    f"another rank of this node fetches {self._cache.tar(key)} for more than {limit_s:.0f} s; start again"
                )

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, EnvironmentFault) and not error.every_rank_speaks:
            error = HostFault(str(error))
        elif isinstance(error, OSError):
            error = HostFault(f"the cache {self._cache_dir} failed ({error}); check its disk or set data.cache_dir")
        with self._state:
            self._error = self._error or error
            self._stop.set()
            self._state.notify_all()

    def _provide(self, key: str, distance: int, uses_of: UsesOf) -> Answer:
        """See that an entry is there and verified, fetching it if need be."""
        if self._cache.tar(key).exists():
            return self._verified(key)
        tar_bytes, index_bytes = self._entries.sizes(key)
        try:
            answer = self._cache.begin(key, tar_bytes=tar_bytes, index_bytes=index_bytes, distance=distance, uses_of=uses_of)
        except CacheTooSmall:
            with self._state:
                if all(self._sizes.get(k) == self._entries.size(k) and not self._entries.is_guessed(k) for k in self._due):
                    raise
                self._published = (set(), set())  # to be said again, with the sizes that are known by now
            return "full"
        if not isinstance(answer, Part):
            return self._verified(key) if answer == "whole" else answer
        if not self._entries.fetch(key, answer, stop=self._stop):
            return "busy"
        self.counts.fetched += 1
        return "whole"

    def _verified(self, key: str) -> Answer:
        """What an earlier run has left is read once before it is trusted."""
        try:
            is_good = self._entries.is_good(key, self._cache, since_s=self._started_at_s)
        except FileNotFoundError:
            is_good = False
        if is_good:
            return "whole"
        if self._cache.tar(key).exists():  # else it was evicted meanwhile
            self._cache.discard(key)
        return "busy"

    def _uses_of(self, passed: int, key: str, distance: int) -> tuple[float, float]:
        """`UsesOf`, counted from the list that was next when `passed` lists had passed: one view for one decision."""
        with self._state:
            uses = self._uses.get(key, [])
            later = bisect_left(uses, passed + distance)
            soonest = uses[0] - passed if uses else math.inf
            return soonest, uses[later] - passed if later < len(uses) else math.inf
