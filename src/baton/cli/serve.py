"""`baton serve` and `baton down`: a thin supervisor of prefill workers, decode workers and a router on this machine."""

import asyncio
import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from baton.cli.ask import ask

READY_TIMEOUT_S = 90.0
STOP_GRACE_S = 10.0
RESTART_DELAY_S = 1.0
BATON = (sys.executable, "-m", "baton.cli")


def home() -> Path:
    """Where pid and logs live: $BATON_HOME/serve, by default ~/.baton/serve."""
    path = Path(os.environ.get("BATON_HOME", Path.home() / ".baton")) / "serve"
    path.mkdir(parents=True, exist_ok=True)
    return path


def serve(
    model: Annotated[str, typer.Option(help="model directory, .gguf file or hub id")],
    prefill: Annotated[int, typer.Option(min=1, help="number of prefill workers")] = 2,
    decode: Annotated[int, typer.Option(min=1, help="number of decode workers")] = 1,
    host: Annotated[str, typer.Option(help="address of the router")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port of the router")] = 8000,
    detach: Annotated[bool, typer.Option("--detach", help="return after one answer; stop with baton down")] = False,
) -> None:
    """Serve MODEL with prefill and decode on separate workers behind one router."""
    if running_pid() is not None:
        raise typer.BadParameter(f"already running (pid {running_pid()}); stop it with `baton down`")
    with socket.socket() as probe:
        if not probe.connect_ex((host, port)):
            raise typer.BadParameter(f"--port {port} on {host} is in use; choose another")
    commands = worker_commands(model, prefill, decode, host, port)
    if not detach:
        (home() / "pid").write_text(str(os.getpid()))
        asyncio.run(supervise(commands))
        (home() / "pid").unlink()
        return
    command = [*BATON, *(argument for argument in sys.argv[1:] if argument != "--detach")]
    with (home() / "supervisor.log").open("wb") as log:
        supervisor = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    wait_ready(supervisor, host, port)
    ask("In one sentence: what is a relay race?", f"http://{host}:{port}", max_tokens=48)
    typer.echo(f"serving at http://{host}:{port}/v1  (logs: {home()}; stop: baton down)")


def worker_commands(model: str, prefill: int, decode: int, host: str, port: int) -> dict[str, list[str]]:
    """Name -> arguments of every process; worker ports are free ones on loopback."""
    ports = iter(free_ports(2 * prefill + decode))
    routing = ["router", "--host", host, "--port", str(port), "--pd-disaggregation", "--policy", "cache_aware"]
    routing += ["--health-check-interval-secs", "5"]
    commands: dict[str, list[str]] = {"router": routing}
    for name in [f"prefill-{i}" for i in range(prefill)] + [f"decode-{i}" for i in range(decode)]:
        mode, worker_port = name.split("-")[0], str(next(ports))
        command = ["engine", "--model-path", model, "--served-model-name", Path(model).name, "--port", worker_port]
        command += ["--disaggregation-mode", mode, "--enable-metrics", "--enable-cache-report"]
        routing += [f"--{mode}", f"http://127.0.0.1:{worker_port}"]
        if mode == "prefill":
            routing.append(str(next(ports)))
            command += ["--disaggregation-bootstrap-port", routing[-1]]
        commands[name] = command
    return commands


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


async def supervise(commands: dict[str, list[str]]) -> None:
    """Run every command until SIGTERM or SIGINT, restarting what dies."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(keep_running(name, command), name=name) for name, command in commands.items()]
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, lambda: [task.cancel() for task in tasks])


async def keep_running(name: str, command: list[str]) -> None:
    while True:
        with (home() / f"{name}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(*BATON, *command, stdout=log, stderr=log)
        try:
            code = await process.wait()
        finally:
            await terminate(process)
        typer.echo(f"{name} exited with {code}; starting it again (log: {home() / name}.log)")
        await asyncio.sleep(RESTART_DELAY_S)


async def terminate(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError, TimeoutError):
        process.terminate()
        await asyncio.wait_for(process.wait(), STOP_GRACE_S)
    if process.returncode is None:
        process.kill()


def wait_ready(supervisor: subprocess.Popen[bytes], host: str, port: int) -> None:
    """Return once the router has a prefill and a decode worker; exit with the logs' place if that does not come."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and supervisor.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection(host, port, timeout=2)
            connection.request("GET", "/readiness")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.1)
    typer.echo(f"not ready after {READY_TIMEOUT_S:.0f} s; see the logs in {home()}", err=True)
    down()
    raise typer.Exit(1)


def running_pid() -> int | None:
    """Pid of the supervisor that runs now, if any."""
    try:
        pid = int((home() / "pid").read_text())
        os.kill(pid, 0)
    except (OSError, ValueError):
        return None
    return pid


def down() -> None:
    """Stop what `baton serve --detach` started."""
    pid = running_pid()
    if pid is None:
        typer.echo("nothing is running")
        return
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 2 * STOP_GRACE_S
    while running_pid() is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    typer.echo("stopped" if running_pid() is None else f"pid {pid} did not stop within {2 * STOP_GRACE_S:.0f} s")
