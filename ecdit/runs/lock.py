"""Keeps a second trainer out of a workdir; sampling and evaluation only read, and take no lock.

On a disk the first process holds a lock of the kernel (flock) on `trainer.lock`, which ends with the process however it
ends. In a bucket it holds a lease: the object `trainer.lock`, written on the condition that nobody else has written it,
and renewed every minute. A lease that was not renewed for five minutes has ended. While the bucket cannot be reached,
its holder cannot know whether another trainer has taken it over. So the holder counts the time by its own clock, which
includes the time for which its machine was suspended, and from the last of the five minutes on commits no checkpoint
and writes no metrics, until it has renewed the lease.
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from ecdit.errors import UserError
from ecdit.files import is_remote, writing
from ecdit.multihost import anywhere
from ecdit.storage import make_directory, read_generation, reading, replace_generation, seconds_since_change

LOCK = "trainer.lock"
LEASE_SECONDS, RENEW_SECONDS = 300.0, 60.0
CLOSE_SECONDS = 10.0  # time for which the end of a run waits for a bucket, to end its lease
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


class LockedError(UserError):
    """Another trainer has the workdir."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that trains in a workdir."""

    host: str
    pid: int
    since: str
    machine: str  # the scope of the process ID: the machine's boot and its namespace of process IDs
    token: str  # unique to this start

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    def has_ended(self) -> bool:
        """Returns whether it is sure that the process runs no more; False where another machine cannot be asked."""
        if self.machine != _machine() or not self.machine:
            return False
        return self.pid == os.getpid() or not Path(f"/proc/{self.pid}").exists()


def _nothing() -> None:
    """Does nothing: a lock of the kernel cannot be lost."""


@dataclasses.dataclass(frozen=True)
class Lock:
    """The checks of a lock that this process holds. Neither uses the network."""

    check: Callable[[], None] = _nothing  # raises LockedError if another trainer has it; call it every step
    check_write: Callable[[], None] = _nothing  # also raises ConnectionError if another one may; before every write


@contextlib.contextmanager
def locked(workdir: Path, say: Callable[[str], None]) -> Iterator[Lock]:
    """Holds the lock of a workdir on the first process. Collective.

    Raises:
      LockedError: another trainer has it, on all processes.
    """
    with contextlib.ExitStack() as stack:
        problem, lock = None, Lock()
        if jax.process_index() == 0:
            try:
                if is_remote(workdir):
                    lease = stack.enter_context(contextlib.closing(Lease(workdir, say)))
                    lock = Lock(lease.check, lease.check_write)
                else:
                    stack.enter_context(_file_lock(workdir, say))
            except UserError as error:
                problem = error
        if found := anywhere(problem):
            text = str(found) if problem else f"{found} lock {workdir}"
            kind = LockedError if problem is None or isinstance(problem, LockedError) else UserError
            raise kind(text) from found  # the cause shows whether it is an outage
        yield lock


@contextlib.contextmanager
def _file_lock(workdir: Path, say: Callable[[str], None]) -> Iterator[None]:
    path = workdir / LOCK
    with contextlib.ExitStack() as stack:
        with writing(path):
            make_directory(workdir)
            file = stack.enter_context(path.open("a+", errors="replace"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _taken(workdir, _holder(file.read())) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UserError(f"{path} cannot be locked: {error}") from error
            say(f"{workdir} is on a file system without locks: nothing keeps a second trainer out of it")
        with writing(path):
            file.truncate(0)
            file.write(_text(_own()))
            file.flush()
        yield


class Lease:
    """The lease of a workdir in a bucket, which a thread renews until it is closed."""

    def __init__(self, workdir: Path, say: Callable[[str], None]):
        """Takes the lease; waits for the end of one whose holder may have been killed.

        Raises:
          LockedError: another trainer holds and renews it.
        """
        self.workdir, self.path, self.own = workdir, workdir / LOCK, _own()
        self.lost = ""  # says that the lease was lost, and to whom
        self.renewed = _clock()  # when the last renewal that succeeded was sent, or earlier
        with reading(workdir):
            self.generation = self._take(say)
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self.thread.start()

    def check(self) -> None:
        """Raises LockedError if the lease is known to be lost, which needs five minutes' silence."""
        if self.lost:
            raise LockedError(self.lost)

    def check_write(self) -> None:
        """Raises LockedError like `check`, and ConnectionError if less than RENEW_SECONDS of the lease are left.

        That time is for the write that follows. (A process that is stopped between this check and its write for longer
        than that still writes.)
        """
        self.check()
        silent = _clock() - self.renewed
        if silent > LEASE_SECONDS - RENEW_SECONDS:
            raise ConnectionError(
                f"{self.path} could not be renewed for {silent:.0f} s, and another trainer may take the lease"
            )

    def close(self) -> None:
        """Ends the lease, or lets it expire if the bucket is away."""
        self.closed.set()
        self.thread.join(CLOSE_SECONDS)  # in an outage a renewal takes minutes
        if not self.lost:
            with contextlib.suppress(Exception):
                replace_generation(self.path, None, self.generation, CLOSE_SECONDS)

    def _take(self, say: Callable[[str], None]) -> bytes:
        first: bytes | None = None
        while True:
            data, generation = read_generation(self.path)
            holder = None if data is None else _holder(data.decode(errors="replace"))
            if first not in (None, generation) and data is not None:
                raise _taken(self.workdir, holder)  # its holder has renewed it
            left = 0.0
            if data is not None and not (holder and holder.has_ended()):
                try:
                    left = LEASE_SECONDS - seconds_since_change(self.path, self.workdir)
                except FileNotFoundError:
                    continue  # its holder has just ended it
            if left <= 0:
                self.renewed = _clock()
                taken = replace_generation(self.path, _text(self.own).encode(), generation)
                if taken is not None:
                    return taken
                continue  # another process took it first
            if first is None:
                say(f"{self.workdir} is leased by {holder}: waiting {left:.0f} s, unless the lease is renewed")
            first = generation
            time.sleep(min(left, RENEW_SECONDS / 4))

    def _keep(self) -> None:
        pause = RENEW_SECONDS
        while not self.closed.wait(pause) and not self.lost:
            try:
                self._renew()
                # In an outage a renewal may take minutes, and what counts is when it was sent.
                pause = 0.0 if _clock() - self.renewed > RENEW_SECONDS else RENEW_SECONDS
            except Exception:  # in an outage, the bucket's contents decide when it is back
                pause = RENEW_SECONDS / 4

    def _renew(self) -> None:
        """Renews the lease, or sets `lost` if the object is not this process's any more."""
        while not self.lost:
            sent = _clock()
            renewed = replace_generation(self.path, _text(self.own).encode(), self.generation)
            if renewed is not None:
                self.generation, self.renewed = renewed, sent
                return
            data, self.generation = read_generation(self.path)
            holder = None if data is None else _holder(data.decode(errors="replace"))
            if holder is None:  # another trainer may have held it and ended since
                what = "is gone" if data is None else "is garbled"
                self.lost = f"{self.workdir} may have been taken over: {self.path}, this run's lease, {what}"
            elif holder.token != self.own.token:
                self.lost = f"{self.workdir} was taken over by {holder}, as this run's lease was not renewed"
            # Otherwise an earlier renewal arrived whose answer did not, some time ago: renew again.


def _clock() -> float:
    """Returns the seconds of a clock that goes on while the machine is suspended, where the system has one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _taken(workdir: Path, holder: Holder | None) -> LockedError:
    whose = f" ({holder})" if holder else ""
    return LockedError(
        f"{workdir} is in use by another trainer{whose}: one at a time; end it, or use another --workdir"
    )


def _own() -> Holder:
    now = datetime.datetime.now(datetime.UTC)
    return Holder(socket.gethostname(), os.getpid(), f"{now:%Y-%m-%d %H:%M:%S} UTC", _machine(), secrets.token_hex(8))


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _text(holder: Holder) -> str:
    return json.dumps(dataclasses.asdict(holder)) + "\n"


def _holder(text: str) -> Holder | None:
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None
