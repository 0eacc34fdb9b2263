"""`Dispatcher.map`: a function over an endless or finite iterable, in chunks, lazy on both sides.

    iterables ── as many as have a use ──▶ chunk ── offered ──▶ pool        (see feeding.py)
    consumer  ◀── chain of its results ◀── window of chunks ◀── settled ┘

Everything happens in the thread that consumes, when it asks for a result: reading, pickling, waiting (which drives the
pool). The look-ahead keeps the workers busy meanwhile.
"""

from __future__ import annotations

import itertools
import operator
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

from bulkhead import validate
from bulkhead._kernel.lifecycle import SETTLED
from bulkhead.chunk import Chunk
from bulkhead.engines.processes.driving import Bell
from bulkhead.engines.processes.interrupts import calm
from bulkhead.engines.processes.pool import ProcessPool
from bulkhead.errors import BulkheadError, ConfigError, ConfigTypeError
from bulkhead.feeding import Offers
from bulkhead.job import name_of
from bulkhead.tally import MapTally, Tally

__all__ = ["MapOptions", "Results"]

# What a chunk of automatic size should take (seconds), and bounds of its items and of its bytes. Why no shorter: each
# costs the caller some tenths of a millisecond when all CPUs compute. Why no longer: other jobs of the pool wait for it
# to end. So many integers of five bytes fit into an empty pipe.
_CHUNK_SECONDS = 0.008
_MAX_ITEMS = 12288
_CHUNK_BYTES = 4 << 20

# A chunk is at most so many times as long as the last one: the first items may not be typical.
_GROWTH = 64

# The last chunks are smaller, down to this part of their size, so that all workers come to the end together.
_LAST = 8

# How much of the measurements so far counts when another one comes in.
_MEMORY = 0.7

# Without a buffersize this many items may be read and not yet given out, or a few chunks for each worker if that is
# more; but nothing is read while results of so many bytes wait.
_LOOKAHEAD = 1000
_LOOKAHEAD_BYTES = 256 << 20

# How many errors in a row the consumer of a map may go on after without a step of ours in between.
_SPARE_LINKS = 8

# Reading one chunk's items should not take longer (seconds): workers wait meanwhile. A source that takes longer for
# one item is slow; then results that have come are given out first.
_READ_SECONDS = 0.005


class MapDisplay(Protocol):
    """Shows how far a map is."""

    def begin(self) -> None: ...
    def end(self, *, is_waiting: bool = True) -> None: ...


class MapOptions:
    """The checked options of a map.

    Raises:
        ConfigError: A value cannot work; the message names the option.
    """

    def __init__(
        self, ordered: bool, chunksize: int | Literal["auto"], buffersize: int | None, timeout: float | None
    ) -> None:
        if not isinstance(ordered, bool):
            raise ConfigTypeError(f"ordered must be True or False, not {ordered!r}")
        self.is_ordered = ordered
        self.chunksize = None
        if isinstance(chunksize, str):
            if chunksize != "auto":
                raise ConfigError(f"chunksize must be a whole number or 'auto', not {chunksize!r}")
        else:
            self.chunksize = validate.whole_number("chunksize", chunksize, at_least=1)
        self.buffersize = None
        if buffersize is not None:
            self.buffersize = validate.whole_number("buffersize", buffersize, at_least=1)
        self.timeout = None if timeout is None else validate.seconds("timeout", timeout)


class Results(itertools.chain[Any]):
    """Iterates over the results of a map. An item that has failed raises; the next call goes on with the next item.

    Why a chain: it takes the results out of the chunks' lists without a line of Python for each.

    Concurrency: one thread at a time, as any iterator.
    """

    _source: _Source

    def close(self) -> None:
        """End the map: nothing more is read or begun, what runs runs to its end, and nothing is given out."""
        self._source.close()

    @classmethod
    def of(
        cls,
        pool: ProcessPool,
        fn: Callable[..., Any],
        iterables: tuple[Iterable[Any], ...],
        options: MapOptions,
        display: Callable[[MapTally], MapDisplay] | None = None,
    ) -> Results:
        """Make the iterator; nothing is read yet.

        Raises:
            ConfigTypeError, JobNotPicklable: `fn` or an iterable cannot be used.
        """
        source = _Source(pool, fn, iterables, options, display)
        results: Results = cls.from_iterable(source.links())  # type: ignore[assignment]
        results._source = source
        return results


class _Source:
    """Gives out the results chunk by chunk. Owner: the consuming thread.

    Race: Ctrl-C may strike anywhere, and the consumer may go on afterwards. So the fields change while it is held off;
    it is let through where the user's iterables are read, items are pickled, and where we wait.

    Attributes:
        is_over: Nothing more will be given out.
    """

    def __init__(
        self,
        pool: ProcessPool,
        fn: Callable[..., Any],
        iterables: tuple[Iterable[Any], ...],
        options: MapOptions,
        display: Callable[[MapTally], MapDisplay] | None,
    ) -> None:
        self._window: deque[Chunk] = deque()  # chunks that are not given out, in the order of their items
        self._display: MapDisplay | None = None
        validate.function("fn", fn)
        self._pool = pool
        self._fn = fn
        self._name = name_of(fn)
        self._options = options
        self._is_star = len(iterables) != 1
        self._input = _Input(_zipped(iterables), _length_hint(iterables))
        pool.pack_items(fn, [])  # so that a function that cannot be sent is refused at once
        self._sizing = _Sizing(options, pool.config.n_workers, pool.config.max_jobs_per_worker)
        self._offers = Offers(_forget, self._sizing.depth)
        # Those of the window that can be given out, in the order of their end.
        self._ready: dict[Chunk, None] = {}
        self._unsent: deque[Chunk] = deque()  # those that have to be sent
        self._n_sent = 0  # those that are with the pool
        self._n_waiting = 0  # items that are read and not given out
        self._n_given = 0  # items of the chunk that was given out last
        self._bytes = 0  # of results that are ready
        self._failure: BaseException | None = None  # raised when all before it is given out
        self._tally = MapTally(self._name, pool.config.priority, _length(iterables))
        self._news = _News((pool.tally, self._tally))
        if display is not None:
            self._display = display(self._tally)
        self._current: Iterator[Any] = iter(())  # the results that are being given out
        self.is_over = False
        self._links: list[Iterator[Any]] = []
        self._next_link = iter(self._links)

    def links(self) -> Iterator[Iterator[Any]]:
        """Return chains over this, so many that one is left after any error; none when all is given out.

        Why: an exception out of its source ends a chain for good. Such exceptions are those of the user's iterables and
        a Ctrl-C, after which the user may go on. Why a list: a Ctrl-C may also strike at the first step of any function
        of ours, before its first line, so none may stand here.
        """
        self._forge_links()
        return self._next_link

    def _forge_links(self) -> None:
        while operator.length_hint(self._next_link) < _SPARE_LINKS:
            self._links.append(itertools.chain.from_iterable(self))

    def __iter__(self) -> Iterator[Any]:
        return self

    def close(self) -> None:
        """Let nothing more begin, and give nothing out."""
        if self._display is not None:
            self._display.end()
        self.is_over = True
        self._links.clear()
        while operator.length_hint(self._current):
            try:
                deque(self._current, maxlen=0)
            except Exception:
                pass  # an item that had failed
        self._pool.abandon(self._leave())

    def __del__(self) -> None:
        # Whoever consumes has left early. Why not `close`: the garbage collector may run under any lock.
        chunks = self._leave()
        if chunks:
            self._pool.drop(chunks)
        if self._display is not None:
            self._display.end(is_waiting=False)

    def _leave(self) -> list[Chunk]:
        chunks = [chunk for chunk in self._window if chunk.state not in SETTLED]
        self._window.clear()
        return chunks

    def __next__(self) -> Iterator[Any]:
        if self._display is not None:
            self._display.begin()
        while not self.is_over:
            # Race: Ctrl-C may have struck before the chain got it.
            if operator.length_hint(self._current):
                return self._current
            with calm():
                self._forge_links()
                self._n_waiting -= self._n_given
                self._n_given = 0
                self._news.bell.is_rung = False
            self._feed()
            with calm():
                chunk = self._next_ready()
                if chunk is not None:
                    self._give(chunk)
                    continue
                self.is_over = not self._window and not self._input.items
                if self.is_over:
                    self._links.clear()
                elif not self._window:
                    continue
            if self.is_over and self._display is not None:
                self._display.end()
            if not self.is_over:
                self._pool.wait_for_bell(self._news.bell)
            elif self._failure is not None:
                raise self._failure
        raise StopIteration

    # What has come

    def _look(self) -> None:
        """See to what the pool has done meanwhile."""
        settled = self._news.settled
        while settled:
            chunk = settled[0]
            self._sizing.learn(chunk)
            # Race: items may be pickled again here, and a second Ctrl-C is not held off; so before all else.
            parts = [] if chunk.is_complete else self._parts(chunk)
            settled.popleft()
            self._n_sent -= 1
            if parts:
                self._replace(chunk, parts)
                continue
            chunk.forget_items()
            self._bytes += chunk.size
            self._ready[chunk] = None
        if self._news.is_refused:
            try:
                self._pool.check_open()
            except BulkheadError as error:
                self._give_up(error)

    def _next_ready(self) -> Chunk | None:
        if not self._options.is_ordered:
            return next(iter(self._ready), None)
        return self._window[0] if self._window and self._window[0] in self._ready else None

    def _give(self, chunk: Chunk) -> None:
        self._current = chunk.outcomes()
        self._window.remove(chunk)
        del self._ready[chunk]
        self._n_given = len(chunk.span)
        self._bytes -= chunk.size

    def _parts(self, chunk: Chunk) -> list[Chunk]:
        """Take a chunk apart: into what is done, and what has to be sent (again)."""
        parts: list[Chunk] = []
        for span, is_missing in chunk.runs():
            if is_missing:
                size = 1 if chunk.is_unreadable else self._sizing.of_rest(len(span))
                starts = range(span.start, span.stop, size)
                parts += [self._redone(chunk, range(at, min(at + size, span.stop))) for at in starts]
            else:
                part = self._part(chunk, span)
                part.fill_from(chunk)
                part.forget_items()
                parts.append(part)
        return parts

    def _replace(self, chunk: Chunk, parts: list[Chunk]) -> None:
        """Put the parts in the chunk's place."""
        place = self._window.index(chunk)
        del self._window[place]
        for part in reversed(parts):
            self._window.insert(place, part)
        ready = [part for part in parts if part.state is not None]
        self._ready.update(dict.fromkeys(ready))
        self._bytes += sum(part.size for part in ready)
        self._unsent += [part for part in parts if part.state is None]

    def _redone(self, chunk: Chunk, span: range) -> Chunk:
        if not chunk.is_unreadable:
            return self._part(chunk, span)
        items, first = list(chunk.items[span.start : span.stop]), chunk.first + span.start
        message, error = self._packed(items)
        part = self._chunk(message, items, first)
        if error is not None:
            part.fail(error)
            self._tally.n_unsent += len(items)
        return part

    def _give_up(self, error: BaseException) -> None:
        """The pool takes no more jobs: what it has accepted is given out, then its refusal."""
        self._unsent.clear()
        while self._window and self._window[-1].state is None:
            self._window.pop()
        for chunk in self._window:
            if chunk.state is None:
                # There are results behind it, and each has its place.
                chunk.fail(error)
                self._ready[chunk] = None
        self._failure = error
        self._news.is_refused = False

    # What is sent

    def _feed(self) -> None:
        with calm():
            self._look()
        while self._wants_more():
            if not self._unsent and not self._read():
                return
            with calm():
                if self._unsent:
                    self._send(self._unsent.popleft())
                self._look()

    def _wants_more(self) -> bool:
        if self._n_sent >= self._sizing.depth:
            return False
        if self._unsent or self._input.items:  # items that a Ctrl-C has kept from being sent
            return True
        if self._failure is not None or self._input.is_at_end:
            return False
        if self._input.is_slow and self._next_ready() is not None:
            return False
        limit = self._options.buffersize
        if limit is not None:
            return self._n_waiting < limit
        is_near = self._n_waiting < self._sizing.lookahead and self._bytes < _LOOKAHEAD_BYTES
        return is_near or not self._window

    def _read(self) -> bool:
        """Read some items and make a chunk of them; False when there are none."""
        size = self._sizing.of_next(self._input.n_left)
        if self._options.buffersize is not None:
            size = min(size, self._options.buffersize - self._n_waiting)
        items = self._input.items
        if self._failure is None:
            try:
                items = self._input.read(size)
            except Exception as error:
                self._failure = error
        if not items:
            return False
        message, refusal = self._packed(items)
        with calm():
            chunk = self._chunk(message, items, self._input.taken())
            self._n_waiting += len(items)
            self._tally.n_read += len(items)
            self._window.append(chunk)
            if refusal is None:
                self._unsent.append(chunk)
            else:
                # One of the items cannot be pickled, nobody knows which: they go one by one.
                chunk.is_unreadable = True
                self._replace(chunk, self._parts(chunk))
        return True

    def _send(self, chunk: Chunk) -> None:
        chunk.waiters = [_Watch(self._news, chunk)]
        self._n_sent += 1
        try:
            self._offers.add(self._pool, chunk)
        except BulkheadError as error:
            self._give_up(error)

    def _packed(self, items: list[Any]) -> tuple[Any, Exception | None]:
        try:
            return self._pool.pack_items(self._fn, items), None
        except Exception as error:
            return None, error

    def _part(self, chunk: Chunk, span: range) -> Chunk:
        part = self._chunk(chunk.message, chunk.items, chunk.first, span)
        part.is_exact = chunk.is_exact
        return part

    def _chunk(self, message: Any, items: Sequence[Any], first: int, span: range | None = None) -> Chunk:
        config = self._pool.config
        chunk = Chunk(
            self._pool,
            message,
            config.priority,
            config.timeout if self._options.timeout is None else self._options.timeout,
            config.retry,
            first=first,
            items=items,
            span=span,
            is_star=self._is_star,
            may_stop=self._options.chunksize is None,
            is_exact=self._options.chunksize is not None,
        )
        chunk.function = self._name
        # Why none with a time limit: who is ended for it must not have begun the next. Why none with parts beside it:
        # what is taken back would leave their descriptors in the line.
        chunk.goes_ahead = chunk.timeout is None and message is not None and message.is_lone
        return chunk


class _News:
    """What the pool tells the consumer of its chunks. Owner: the pool's lock.

    Why apart from the source: a chunk under way refers to it, and must not keep alive a source that nobody reads.
    """

    def __init__(self, tallies: tuple[Tally, ...]) -> None:
        self._tallies = tallies
        self.settled: deque[Chunk] = deque()  # the consumer takes them out
        self.is_refused = False
        self.bell = Bell()

    def settle(self, chunk: Chunk) -> None:
        """A chunk has settled. May be said twice in a row, when an exception has struck here."""
        if not self.settled or self.settled[-1] is not chunk:
            self.settled.append(chunk)
        for tally in self._tallies:
            tally.count(chunk)


class _Watch:
    """Waits for the end of one chunk."""

    def __init__(self, news: _News, chunk: Chunk) -> None:
        self._news = news
        self._chunk = chunk

    def fire(self) -> bool:
        """Something has happened to the chunk: accepted, refused or settled. Called under the pool's lock.

        Returns:
            Whether its end is still to come.
        """
        chunk, news = self._chunk, self._news
        if chunk.state in SETTLED:
            news.settle(chunk)
        elif chunk.state is None:
            news.is_refused = True
        else:
            return True
        news.bell.ring()
        return False


class _Input:
    """The items that come out of the user's iterables, with those that are read and not in a chunk yet.

    Attributes:
        items: Those.
        is_slow: The last item took long to come.
        is_at_end: There will be no more; it is not asked again.
    """

    def __init__(self, source: Iterator[Any], length: int | None = None) -> None:
        self._source = source
        self._length = length
        self._n_taken = 0
        self.items: list[Any] = []
        self.is_slow = False
        self.is_at_end = False

    @property
    def n_left(self) -> int | None:
        """How many items are still to come, as far as the iterables tell; None if they do not, or were wrong."""
        left = 0 if self._length is None else self._length - self._n_taken
        return left if left > 0 else None

    def read(self, size: int) -> list[Any]:
        """Read up to `size` items, fewer when the source ends or is slow, and return them.

        Raises:
            BaseException: Whatever the source raises; the items before that stay in `items`.
        """
        clock = time.monotonic
        began, step = clock(), 1
        while len(self.items) < size and not self.is_at_end:
            before = len(self.items)
            step = min(step, size - before)
            # What was read before an exception is in the list then.
            self.items.extend(itertools.islice(self._source, step))
            took = clock() - began
            self.is_slow = took > _READ_SECONDS
            self.is_at_end = len(self.items) < before + step
            if self.is_slow or self.is_at_end:
                break
            step *= 2
        return self.items

    def taken(self) -> int:
        """Forget the items, which are in a chunk now; return the number of the first of them."""
        first = self._n_taken
        self._n_taken += len(self.items)
        self.items = []
        return first


class _Sizing:
    """How many items the next chunk should have, and how many may be read ahead, from what the last ones took.

    Attributes:
        size: How many items it should have when enough are left.
        depth: How many chunks may be with the pool: those that run, and the next ones.
    """

    def __init__(self, options: MapOptions, n_workers: int, max_jobs: int | None = None) -> None:
        self._n_workers = n_workers
        self.depth = 2 * n_workers
        self._is_fixed = options.chunksize is not None
        # No worker does more, and what it gives back has to be sent again.
        self._limit = _MAX_ITEMS if max_jobs is None else min(_MAX_ITEMS, max_jobs)
        if options.buffersize is not None:
            self._limit = max(1, min(self._limit, options.buffersize // (2 * n_workers)))
        self._items = self._seconds = self._bytes = 0.0  # of the last chunks, older ones counting less
        self.size = options.chunksize or 1
        if max_jobs is not None:
            self.size = min(self.size, max_jobs)

    @property
    def lookahead(self) -> int:
        """How many items may be read and not given out when the user has named no bound."""
        return max(_LOOKAHEAD, 4 * self._n_workers * self.size)

    def of_next(self, n_left: int | None) -> int:
        """Return how many items the next chunk should have, when so many are still to come (None: unknown)."""
        if n_left is None or self._is_fixed:
            return self.size
        return min(self.size, max(n_left // self._n_workers, self.size // _LAST, 1))

    def of_rest(self, n: int) -> int:
        """Return how many items the chunks should have that so many are dealt in which a worker has given back."""
        # Why a part for each worker: these take longer than was expected, and what they take is learned slowly.
        return self.size if self._is_fixed else min(self.size, -(-n // self._n_workers))

    def learn(self, chunk: Chunk) -> None:
        """Take in what a chunk has taken."""
        n = chunk.n_ended
        if self._is_fixed or chunk.seconds is None or n == 0:
            return
        self._items = _MEMORY * self._items + n
        self._seconds = _MEMORY * self._seconds + chunk.seconds
        self._bytes = _MEMORY * self._bytes + chunk.size + chunk.message.size * n / len(chunk.items)
        by_time = _CHUNK_SECONDS * self._items / max(self._seconds, 1e-9)
        by_bytes = _CHUNK_BYTES * self._items / max(self._bytes, 1)
        self.size = int(max(1, min(by_time, by_bytes, max(_GROWTH * n, self.size), self._limit)))


def _zipped(iterables: tuple[Iterable[Any], ...]) -> Iterator[Any]:
    if not iterables:
        raise ConfigTypeError("map needs at least one iterable besides the function")
    for one in iterables:
        if not isinstance(one, Iterable) and not hasattr(one, "__getitem__"):
            raise ConfigTypeError(f"map needs iterables, not {one!r} of type {type(one).__name__}")
    return iter(iterables[0]) if len(iterables) == 1 else zip(*iterables, strict=False)


def _length(iterables: tuple[Iterable[Any], ...]) -> int | None:
    try:
        return min(len(one) for one in iterables)  # type: ignore[arg-type]
    except Exception:  # one has no length, or one of the user's that raises
        return None


def _length_hint(iterables: tuple[Iterable[Any], ...]) -> int | None:
    """Return how many items there may be; a guess of theirs, for speed alone."""
    try:
        hints = [operator.length_hint(one, -1) for one in iterables]
    except Exception:  # one of the user's that raises
        return None
    return min((hint for hint in hints if hint >= 0), default=None)


def _forget(chunk: Any) -> None:
    """A chunk that was not accepted needs no clearing up."""
