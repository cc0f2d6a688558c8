"""Writes to the state database in their order, in a thread of their own. No request and no decision waits for them.

While the database is away, writes are kept in memory and repeated at each tick. At most `MAX_KEPT` are kept: audits are
dropped first, then decisions that change nothing. A return to dense is never dropped; it is also in a file
(`dense_mark`). A write whose end the database did not confirm is repeated, so a note may be there twice.

    journal = Journal(); journal.submit("note", partial(store.note, state, change, now)); journal.flush(1.0)
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy.exc import DataError, IntegrityError

from niwaki.errors import OutputError

log = logging.getLogger("niwaki.rollout")
MAX_KEPT = 1000
PATIENCE_S = 1.0  # a tick waits that long for the database, then goes on without it
_LATEST = ("poll", "save")  # the latest of these replaces one that waits
_DROPPED = ("audit", "note")  # what is dropped first when too many wait


@dataclass(eq=False)
class Write:
    """Write that waits, runs or is done."""

    kind: str
    work: Callable[[], None]
    begun: bool = False
    done: bool = False


class Journal:
    """Queue of writes to the database, and the thread that carries them out."""

    def __init__(self) -> None:
        self.error: OutputError | None = None
        self.dropped = 0
        self._waiting: deque[Write] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._since: float | None = None  # start of the write that runs

    @property
    def kept(self) -> int:
        """Return the number of writes that are not in the database yet."""
        return len(self._waiting)

    @property
    def away(self) -> bool:
        """Check that the database failed, or does not answer."""
        since = self._since
        return self.error is not None or (since is not None and time.monotonic() - since > PATIENCE_S)

    def submit(self, kind: str, work: Callable[[], None]) -> Write:
        """Add a write. It starts at once, or at the next `flush` if the database is away."""
        write = Write(kind, work)
        with self._changed:
            if kind in _LATEST:
                self._discard(kind)
            if len(self._waiting) >= MAX_KEPT and any(self._discard(one) for one in _DROPPED):
                self.dropped += 1
            self._waiting.append(write)
            if self.error is None:
                self._start()
        return write

    def flush(self, timeout_s: float = PATIENCE_S) -> bool:
        """Try again what failed, and wait for the end of all writes. Return False if some are still not written."""
        with self._changed:
            if self.away and self._since is not None:  # a write hangs: waiting again would only delay decisions
                return False
            self.error = None
            self._start()
            self._changed.wait_for(lambda: not self._waiting or self.error is not None, timeout_s)
            return not self._waiting

    def withdraw(self, write: Write) -> bool:
        """Take back a write that did not start. Return False if it runs or is done."""
        with self._changed:
            if write.begun or write.done:
                return False
            self._waiting.remove(write)
            return True

    def check(self) -> None:
        """Raise OutputError if the last write failed."""
        if self.error is not None:
            raise self.error

    def _start(self) -> None:
        if self._thread is None and self._waiting:
            self._thread = threading.Thread(target=self._run, name="niwaki-state", daemon=True)
            self._thread.start()

    def _discard(self, kind: str) -> bool:
        """Remove the oldest write of a kind that did not start."""
        found = next((write for write in self._waiting if write.kind == kind and not write.begun), None)
        if found is not None:
            self._waiting.remove(found)
        return found is not None

    def _run(self) -> None:
        """Carry out writes until none waits or one fails."""
        while True:
            with self._changed:
                if not self._waiting or self.error is not None:
                    self._thread = None
                    self._changed.notify_all()
                    return
                write = self._waiting[0]
                write.begun, self._since = True, time.monotonic()
            failure = _failure(write)
            with self._changed:
                self._since = None
                if failure is not None and not _is_lasting(failure, write):
                    write.begun, self.error = False, failure
                else:
                    write.done = True
                    self._waiting.popleft()


def _failure(write: Write) -> OutputError | None:
    try:
        write.work()
    except OutputError as error:
        return error
    except Exception:  # a fault of our own: it must not stop the writes after it
        log.exception("a write to the roll-out state failed: %s", write.kind)
    return None


def _is_lasting(failure: OutputError, write: Write) -> bool:
    """Check that the database refuses a write itself, so that it would refuse it again."""
    lasting = isinstance(failure.__cause__, DataError | IntegrityError) and write.kind != "dense"
    if lasting:
        log.error("%s: the write is dropped (%s)", failure, write.kind)
    return lasting
