"""`baton up`, `baton down`, `baton env`: the embedded cluster from the command line. Parses, calls `baton.cluster`, prints."""

import asyncio
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from baton.api.resources import SERVICES
from baton.cli import serve
from baton.cli.live import Lines
from baton.cluster import launch
from baton.cluster.apply import Applied, Applier
from baton.cluster.follow import Follower, Outcome, Target, standing
from baton.cluster.home import ISOLATIONS, ClusterHome, DaemonRecord, HomeError, Settings
from baton.cluster.manifests import Manifest, load
from baton.cluster.progress import addresses
from baton.cluster.publish import check_names, choose_port
from baton.cluster_client import Client, ClientError, ClusterConfig

HomeOption = Annotated[Path | None, typer.Option("--home", help="state directory [default: $BATON_HOME or ~/.baton]")]


def up(
    files: Annotated[list[Path] | None, typer.Argument(help="manifests (or directories of them) to apply")] = None,
    volume: Annotated[list[str] | None, typer.Option(help="CLAIM=DIR: what a claim is on this machine")] = None,
    publish: Annotated[list[str] | None, typer.Option(help="SERVICE=PORT: its address on 127.0.0.1")] = None,
    isolation: Annotated[str | None, typer.Option(help=f"how pods are kept apart: {', '.join(ISOLATIONS)}")] = None,
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="for objects that name none")] = "default",
    timeout: Annotated[float, typer.Option(min=0, help="seconds to wait until everything is ready")] = 180.0,
    wait: Annotated[bool, typer.Option(help="wait until everything is ready")] = True,
    home: HomeOption = None,
) -> None:
    """Start the embedded cluster, apply FILES, and wait until all of it is ready."""
    with errors_as_lines("up"):
        place = ClusterHome.find(home)
        manifests, problems = load(list(files or []))
        volumes = pairs("--volume", volume, "CLAIM=DIR")
        ports = {name: port_number(name, text) for name, text in pairs("--publish", publish, "SERVICE=PORT").items()}
        record, started = start(place, isolation, {claim: directory(claim, text) for claim, text in volumes.items()})
        if started or not files:
            typer.echo(f"cluster is up ({place.root}; isolation {record.isolation_note})")
        for problem in problems:
            typer.echo(str(problem), err=True)
        is_ready = True
        if manifests:
            check_names(manifests, ports)
            is_ready = asyncio.run(
                bring_up(record.client_config(place), manifests, ports, namespace, timeout if wait else None)
            )
        if not files:
            typer.echo('a kubectl for it: eval "$(baton env)"')
            if started and wait:
                is_ready = asyncio.run(resume(record.client_config(place), timeout))
        if problems or not is_ready:
            raise typer.Exit(1)


def down(
    purge: Annotated[bool, typer.Option("--purge", help="forget the cluster's state and logs too")] = False,
    home: HomeOption = None,
) -> None:
    """Stop the embedded cluster and its pods; `baton up` resumes them."""
    with errors_as_lines("down"):
        place = ClusterHome.find(home)
        stopped = launch.stop(place)
        supervised = (place.root / "serve" / "pid").exists()
        if supervised:
            serve.down()
        if stopped or not supervised:
            typer.echo("stopped" if stopped else "nothing is running")
        if purge:
            launch.purge(place)
            typer.echo(f"forgotten: state and logs in {place.root}")


def env(home: HomeOption = None) -> None:
    """Print shell commands that point kubectl at the cluster: eval "$(baton env)"."""
    import shlex

    with errors_as_lines("env"):
        place = ClusterHome.find(home)
        if DaemonRecord.read(place) is None:
            fail("env", f"no cluster runs for {place.root}; start it with `baton up`")
        typer.echo(f"export KUBECONFIG={shlex.quote(str(place.kubeconfig))}")
        typer.echo(f'export PATH={shlex.quote(str(place.bin))}:"$PATH"')


def start(place: ClusterHome, isolation: str | None, volumes: dict[str, str]) -> tuple[DaemonRecord, bool]:
    """The daemon, with the choices kept for the next time."""
    if isolation is not None and isolation not in ISOLATIONS:
        raise HomeError(f"--isolation {isolation}: choose one of {', '.join(ISOLATIONS)}")
    settings = Settings.read(place)
    settings = replace(settings, volumes={**settings.volumes, **volumes}, isolation=isolation or settings.isolation)
    settings.write(place)
    link_kubectl(place)
    record, started = launch.ensure_running(place, demo_model_arguments())
    if not started and isolation not in (None, "auto", record.isolation):
        raise HomeError(f"--isolation {isolation}: the cluster runs with {record.isolation}; `baton down` first")
    return record, started


async def bring_up(
    config: ClusterConfig, manifests: list[Manifest], ports: dict[str, int], namespace: str, timeout_s: float | None
) -> bool:
    """Apply, wait, print; whether all of it is in the cluster and ready."""
    async with Client(config, user_agent="baton-up", field_manager="baton-up") as client:
        applier, applied, is_complete = Applier(client, namespace), list[Applied](), True
        for manifest in manifests:
            result = await applier.apply(manifest)
            if isinstance(result, Applied):
                applied.append(result)
                if result.resource == SERVICES and manifest.name in ports:
                    await choose_port(client, result.object, ports[manifest.name])
                typer.echo(f"{result.title} {result.outcome}")
            else:
                is_complete = False
                for problem in result:
                    typer.echo(str(problem), err=True)
        if timeout_s is None or not applied:
            return is_complete
        return await follow(client, [Target.applied(one) for one in applied], timeout_s) and is_complete


async def resume(config: ClusterConfig, timeout_s: float) -> bool:
    """Wait for what the cluster ran when it was stopped."""
    async with Client(config, user_agent="baton-up") as client:
        targets = await standing(client)
        return not targets or await follow(client, targets, timeout_s)


async def follow(client: Client, targets: list[Target], timeout_s: float) -> bool:
    with Lines() as lines:
        async with Follower(client, targets).running() as follower:
            outcome = await follower.wait(timeout_s, lines.show)
    report(outcome, timeout_s)
    return outcome.is_ready


def report(outcome: Outcome, timeout_s: float) -> None:
    """Where to reach what is ready, and what is not and why."""
    for name, address in addresses(outcome.services):
        typer.echo(f"service/{name}: {address}")
    waiting = [row for row in outcome.rows if row.state != "ready"]
    if waiting:
        typer.echo("not ready:", err=True)
    for row in waiting:
        typer.echo(f"  {row.where}{row}", err=True)
    if any(row.state == "waiting" for row in waiting):
        typer.echo(
            f"  gave up after {timeout_s:.0f} s; it goes on without this command (see `kubectl get pods`)", err=True
        )


def pairs(option: str, values: list[str] | None, form: str) -> dict[str, str]:
    """`A=B` options as a mapping. Raises `HomeError` naming the option."""
    found = {}
    for value in values or []:
        key, separator, text = value.partition("=")
        if not separator or not key or not text:
            raise HomeError(f"{option} {value}: write {form}")
        found[key] = text
    return found


def directory(claim: str, text: str) -> str:
    path = Path(text).expanduser().absolute()
    if not path.is_dir():
        raise HomeError(f"--volume {claim}={text}: no such directory")
    return str(path)


def port_number(service: str, text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise HomeError(f"--publish {service}={text}: the port must be a number from 1 to 65535")
    return int(text)


def demo_model_arguments() -> list[str]:
    """The demo model for claims without a directory; a machine that cannot have it only gets a note."""
    from baton.engine.errors import ModelError
    from baton.engine.weights.demo import prepare_demo_model

    try:
        return ["--demo-model", str(prepare_demo_model())]
    except ModelError as error:
        typer.echo(f"note: no demo model, so claims need --volume CLAIM=DIR: {error}", err=True)
        return []


def link_kubectl(place: ClusterHome) -> None:
    """`kubectl` (the packaged one, beside this Python) and `baton` in the directory that `baton env` puts on PATH."""
    place.bin.mkdir(exist_ok=True)
    for name in ("kubectl", "baton"):
        program = Path(sys.executable).parent / name
        found = str(program) if program.exists() else shutil.which(name)
        link = place.bin / name
        if found and Path(found) != link and (not link.is_symlink() or link.readlink() != Path(found)):
            link.unlink(missing_ok=True)
            link.symlink_to(found)


@contextmanager
def errors_as_lines(command: str) -> Iterator[None]:
    try:
        yield
    except (HomeError, launch.LaunchError, ClientError) as error:
        fail(command, str(error))


def fail(command: str, text: str) -> NoReturn:
    typer.echo(f"baton {command}: {text}", err=True)
    raise typer.Exit(1) from None
