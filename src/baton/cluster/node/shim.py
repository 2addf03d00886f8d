"""The supervisor beside each container: starts it, writes its log, learns its exit status, clears what it leaves.

Run as a plain script (`python -I -S shim.py DIR`), so only the standard library, and few modules of it: one shim lives as
long as its container and outlives the node agent. `DIR/launch.json` says what to run (see `supervised.Launch`).
The shim writes `state.json` (who runs: pid and start time), `exit.json` (how it ended, always the last file written), and
the log in the CRI line format (`TIME stdout|stderr F|P TEXT`). SIGTERM asks it to end the container within the seconds
that `stop.json` names: SIGTERM to the main process, at its end SIGTERM to what it left behind, SIGKILL to all at the
deadline. No decision about restarts is taken here.

The process functions (`start_time`, `members`, `kill_members`) are also used by the agent, for what a dead shim left.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator

MAX_LINE_BYTES = 16384
READ_BYTES = 65536
DYING_POLL_S = 0.05
KILL_WAIT_S = 5.0
"""How long to wait for killed processes to vanish; one stuck in the kernel must not hold the shim for ever."""
ARGS_FD = 10
STATUS_FD = 11
MARKER = "BATON_CONTAINER"
"""Environment variable that marks every process of a container; its value is unique for one attempt."""

Json = dict[str, object]


def start_time(pid: int) -> int | None:
    """Start of the process in clock ticks since boot; with the pid it names a process for ever. None: no such process."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in ("Z", "X") else int(fields[19])


def members(session: int, mark: str, mount_namespace: str | None) -> Iterator[int]:
    """Living processes of one container: of its session, with its mark in the environment, or in its mount namespace."""
    wanted = f"{MARKER}={mark}".encode()
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        fields = _stat(int(entry))
        if fields is None or fields[0] in ("Z", "X"):
            continue
        if int(fields[3]) == session or _has_mark(entry, wanted) or _in_namespace(entry, mount_namespace):
            yield int(entry)


def kill_members(session: int, mark: str, mount_namespace: str | None, number: int = signal.SIGKILL) -> int:
    """Signal every member; how many there were."""
    count = 0
    for pid in members(session, mark, mount_namespace):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
        count += 1
    return count


def write_json(path: str, value: Json) -> None:
    """Whole or not at all, and readable by the owner only."""
    part = path + ".part"
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(value, file)
    os.rename(part, path)


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on (index 0 is field 3)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return None


def _has_mark(pid: str, wanted: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return wanted in file.read().split(b"\0")
    except OSError:
        return False


def _in_namespace(pid: str, mount_namespace: str | None) -> bool:
    return mount_namespace is not None and mount_namespace_of(int(pid)) == mount_namespace


def mount_namespace_of(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return None


def pinned_mount_namespace(pid: int) -> str | None:
    """The process's mount namespace if it is not ours, kept in being as long as this process lives.

    The number of a namespace that has ended is given to the next one at once: without the pin a later kill by number
    would hit a stranger.
    """
    try:
        descriptor = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        found = os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return None
    if found == mount_namespace_of(os.getpid()):
        os.close(descriptor)
        return None
    return found


class Log:
    """One container's log: CRI lines, rotated at `max_bytes`, `keep` old files beside the current one."""

    def __init__(self, path: str, max_bytes: int, keep: int) -> None:
        self._path, self._max_bytes, self._keep = path, max_bytes, keep
        self._pending = {"stdout": b"", "stderr": b""}
        self._fd = self._open()
        self._size = os.fstat(self._fd).st_size

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(self, stream: str, data: bytes) -> None:
        *lines, rest = (self._pending[stream] + data).split(b"\n")
        prefix = _stamp() + f" {stream} ".encode()
        out = []
        for line in lines:
            while len(line) > MAX_LINE_BYTES:
                out.append(prefix + b"P " + line[:MAX_LINE_BYTES] + b"\n")
                line = line[MAX_LINE_BYTES:]
            out.append(prefix + b"F " + line + b"\n")
        while len(rest) > MAX_LINE_BYTES:
            out.append(prefix + b"P " + rest[:MAX_LINE_BYTES] + b"\n")
            rest = rest[MAX_LINE_BYTES:]
        self._pending[stream] = rest
        self._append(out)

    def flush(self) -> None:
        """Text after the last newline, when no more can come."""
        for stream, rest in self._pending.items():
            if rest:
                self._append([_stamp() + f" {stream} P ".encode() + rest + b"\n"])
                self._pending[stream] = b""

    def _append(self, lines: list[bytes]) -> None:
        data = b"".join(lines)
        while data:
            if self._size >= self._max_bytes:
                self._rotate()
            room = max(self._max_bytes - self._size, 1)
            cut = len(data) if len(data) <= room else data.find(b"\n", room - 1) + 1
            piece, data = data[:cut], data[cut:]
            try:
                self._size += os.write(self._fd, piece)
            except OSError:  # disk full: the container goes on, its words are lost
                return

    def _rotate(self) -> None:
        os.close(self._fd)
        for number in range(self._keep, 0, -1):
            source = self._path if number == 1 else f"{self._path}.{number - 1}"
            with contextlib.suppress(FileNotFoundError):
                os.replace(source, f"{self._path}.{number}")
        self._fd, self._size = self._open(), 0


def _stamp() -> bytes:
    now = time.time_ns()
    return (time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 10**9)) + f".{now % 10**9:09d}Z").encode()


class Shim:
    """One container, from fork to exit.json."""

    def __init__(self, directory: str) -> None:
        self._dir = directory
        with open(f"{directory}/launch.json", encoding="utf-8") as file:
            self._launch = json.load(file)
        self._log = Log(self._launch["log"], self._launch["log_max_bytes"], self._launch["log_keep"])
        self._mark = str(self._launch["env"][MARKER])
        self._deadline: float | None = None
        self._is_killing = False
        self._pid = 0
        self._main_pid = 0
        self._namespace: str | None = None
        self._started_at = time.time()
        self._poll = select.poll()
        self._streams: dict[int, str] = {}
        self._status_fd = -1
        self._status = b""

    def run(self) -> None:
        wake, wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        error = self._start()
        if error is not None:
            self._end(128, 0, time.time(), error)
            return
        main = os.pidfd_open(self._pid)
        self._poll.register(main, select.POLLIN)
        self._poll.register(wake, select.POLLIN)
        while True:
            ready = dict(self._poll.poll(self._timeout_ms()))
            for fd in [one for one in ready if one in self._streams]:
                self._read(fd)
            if self._status_fd in ready:
                self._read_status()
            if wake in ready:
                os.read(wake, 512)
                self._on_stop()
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._is_killing = True
                self._signal_all(signal.SIGKILL)
            if main in ready:
                break
        finished_at = time.time()
        # Reaped only at the end: until then nobody else can get its pid, which is also the session's number.
        self._clear_rest()
        self._drain()
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        self._end(128 - code if code < 0 else code, -code if code < 0 else 0, finished_at, None)

    def _start(self) -> str | None:
        """Fork and exec; what went wrong, or None. Returns only when the program runs (plain) or bwrap does."""
        out, out_writer = os.pipe2(os.O_CLOEXEC)
        err, err_writer = os.pipe2(os.O_CLOEXEC)
        failure, failure_writer = os.pipe2(os.O_CLOEXEC)
        status, status_writer = os.pipe2(os.O_CLOEXEC)
        self._pid = self._main_pid = os.fork()
        if self._pid == 0:
            self._exec(out_writer, err_writer, failure_writer, status_writer)
        for fd in (out_writer, err_writer, failure_writer, status_writer):
            os.close(fd)
        message = b""
        while chunk := os.read(failure, 4096):
            message += chunk
        os.close(failure)
        if message:
            os.waitpid(self._pid, 0)
            return message.decode(errors="replace")
        self._streams = {out: "stdout", err: "stderr"}
        self._poll.register(out, select.POLLIN)
        self._poll.register(err, select.POLLIN)
        if self._launch.get("bwrap_args") is None:
            os.close(status)
        else:
            self._status_fd = status
            self._poll.register(status, select.POLLIN)
        self._write_state()
        return None

    def _exec(self, out: int, err: int, failure: int, status: int) -> None:
        """In the child: become the container. Never returns."""
        try:
            os.setsid()
            null = os.open("/dev/null", os.O_RDONLY)
            os.dup2(null, 0)
            os.dup2(out, 1)
            os.dup2(err, 2)
            if self._launch.get("bwrap_args") is not None:
                args = os.memfd_create("bwrap-args", 0)
                os.write(args, "".join(f"{arg}\0" for arg in self._launch["bwrap_args"]).encode())
                os.lseek(args, 0, os.SEEK_SET)
                os.dup2(args, ARGS_FD)
                os.dup2(status, STATUS_FD)
            for number in (signal.SIGPIPE, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            os.chdir(self._launch["cwd"])
            os.execvpe(self._launch["argv"][0], self._launch["argv"], self._launch["env"])
        except BaseException as error:  # whatever it is must reach the parent, and this child must not go on
            with contextlib.suppress(OSError):
                os.write(failure, self._why(error).encode())
        os._exit(127)

    def _why(self, error: BaseException) -> str:
        if isinstance(error, NotADirectoryError | FileNotFoundError) and error.filename == self._launch["cwd"]:
            return f'workingDir "{self._launch["cwd"]}": {error.strerror}'
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return f'exec: "{self._launch["argv"][0]}": executable file not found in $PATH'
        return f'exec: "{self._launch["argv"][0]}": {getattr(error, "strerror", None) or error}'

    def _read_status(self) -> None:
        """bwrap tells the pid of the container's own process; that one, not bwrap, gets the signals."""
        data = os.read(self._status_fd, READ_BYTES)
        self._status += data
        while b"\n" in self._status:
            line, _, self._status = self._status.partition(b"\n")
            pid = json.loads(line).get("child-pid")
            if pid is not None:
                self._main_pid = int(pid)
                self._namespace = pinned_mount_namespace(self._main_pid)
                self._write_state()
        if not data:
            self._poll.unregister(self._status_fd)
            os.close(self._status_fd)
            self._status_fd = -1

    def _write_state(self) -> None:
        write_json(
            f"{self._dir}/state.json",
            {
                "shim_pid": os.getpid(), "shim_start": start_time(os.getpid()),
                "pid": self._main_pid, "pid_start": start_time(self._main_pid), "session": self._pid,
                "started_at": self._started_at,
            },
        )  # fmt: skip

    def _timeout_ms(self) -> int | None:
        if self._is_killing:
            return int(DYING_POLL_S * 1000)
        return None if self._deadline is None else max(0, int((self._deadline - time.monotonic()) * 1000)) + 1

    def _on_stop(self) -> None:
        """A stop request; a later one can only make the deadline earlier."""
        try:
            with open(f"{self._dir}/stop.json", encoding="utf-8") as file:
                grace_s = float(json.load(file)["grace_s"])
        except (OSError, ValueError, KeyError):
            grace_s = 30.0
        first = self._deadline is None
        deadline = time.monotonic() + grace_s
        self._deadline = deadline if self._deadline is None else min(deadline, self._deadline)
        if first and grace_s > 0:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._main_pid, signal.SIGTERM)

    def _signal_all(self, number: int) -> int:
        return kill_members(self._pid, self._mark, self._namespace, number)

    def _clear_rest(self) -> None:
        """The container is its main process: what that left behind ends too, gently if this is a stop."""
        if self._deadline is not None and self._deadline > time.monotonic() and self._signal_all(signal.SIGTERM):
            while time.monotonic() < self._deadline and any(True for _ in self._members()):
                self._pump(DYING_POLL_S)
        give_up = time.monotonic() + KILL_WAIT_S
        while self._signal_all(signal.SIGKILL) and time.monotonic() < give_up:
            self._pump(DYING_POLL_S)

    def _members(self) -> Iterator[int]:
        return members(self._pid, self._mark, self._namespace)

    def _pump(self, seconds: float) -> None:
        """Keep the pipes empty while waiting, so that nobody blocks on its last words."""
        poll = select.poll()
        for fd in self._streams:
            poll.register(fd, select.POLLIN)
        for fd, _ in poll.poll(int(seconds * 1000)):
            self._read(fd)

    def _read(self, fd: int) -> None:
        data = os.read(fd, READ_BYTES)
        if data:
            self._log.write(self._streams[fd], data)
            return
        with contextlib.suppress(KeyError):
            self._poll.unregister(fd)
        del self._streams[fd]
        os.close(fd)

    def _drain(self) -> None:
        """What is still in the pipes. A process that escaped all marks may hold them open: it is not waited for."""
        while self._streams:
            before = len(self._streams)
            poll = select.poll()
            for fd in self._streams:
                poll.register(fd, select.POLLIN)
            ready = poll.poll(100)
            for fd, _ in ready:
                self._read(fd)
            if not ready and before == len(self._streams):
                break
        self._log.flush()

    def _end(self, code: int, number: int, finished_at: float, error: str | None) -> None:
        write_json(
            f"{self._dir}/exit.json",
            {
                "code": code, "signal": number, "error": error,
                "started_at": self._started_at, "finished_at": finished_at,
            },
        )  # fmt: skip


if __name__ == "__main__":
    os.chdir("/")
    Shim(sys.argv[1]).run()
