"""The daemon of one embedded cluster: API server, controllers, scheduler, node agent, services, in one process.

`python -m baton.cluster.daemon --home DIR`, started by `launch`. Owns the wiring and the order of start and stop; every
part but the API server is an ordinary client of it. SIGTERM stops the pods too and keeps the state; after a SIGKILL the
pods run on and the next daemon adopts them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import uvloop
import yaml

import baton
from baton import api
from baton.api import lws, lws_validation
from baton.api.resources import CUSTOM_RESOURCE_DEFINITIONS
from baton.cluster import dataplane
from baton.cluster.apiserver import ApiServer, Serving, Store, kubeconfig, serve
from baton.cluster.claims import default_source
from baton.cluster.home import HOST, ClusterHome, DaemonRecord, HomeError, Settings, write_private
from baton.cluster.logfmt import configure_logging
from baton.cluster.node.agent import NodeAgent, NodeConfig
from baton.cluster.node.isolation import IsolationError
from baton.cluster.node.slots import SlotStore
from baton.cluster.shutdown import stop_pods
from baton.cluster_client import Client
from baton.controllers.runner import Runner, builtin_controllers, our_controllers

logger = logging.getLogger(__name__)
_GROUPS = api.resources.ROLE_BASED_GROUPS.full_name
_LEADER_WORKER_SETS = api.resources.LEADER_WORKER_SETS.full_name
DATAPLANE_TIMEOUT_S = 15.0
CANNOT_START = "cannot start: "
"""How the last log line begins when a start was refused."""


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """`demo_model`: what a claim without a directory is. `with_node` False: something else plays the kubelet."""

    home: ClusterHome
    settings: Settings
    demo_model: Path | None = None
    with_node: bool = True


class ClaimDirectories(Mapping[str, Path]):
    """`--volume` choices as the settings file has them now, so that a later `baton up --volume` reaches this process."""

    def __init__(self, home: ClusterHome) -> None:
        self._home = home
        self._stamp: int | None = None
        self._found: dict[str, Path] = {}

    def _now(self) -> dict[str, Path]:
        try:
            stamp = self._home.settings_file.stat().st_mtime_ns
        except FileNotFoundError:
            return {}
        if stamp != self._stamp:
            self._found = {name: Path(text) for name, text in Settings.read(self._home).volumes.items()}
            self._stamp = stamp
        return self._found

    def __getitem__(self, name: str) -> Path:
        return self._now()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())


class Daemon:
    """One cluster from start to stop. `run` returns after `stop` was asked for and everything ended."""

    def __init__(self, config: DaemonConfig) -> None:
        self._config = config
        self._home = config.home
        self._stop = asyncio.Event()

    def stop(self) -> None:
        self._stop.set()

    async def run(self) -> None:
        """Raises what keeps a part from starting; a part that dies later takes the daemon down, with the log saying why."""
        slots = SlotStore(self._home.root)
        port = self._config.settings.api_port
        async with AsyncExitStack() as stack:
            store = Store(self._home.database)
            stack.push_async_callback(store.close)
            url = f"http://{HOST}:{port}"
            client = Client(self._config.settings.client_config(url), user_agent="baton-daemon", field_manager="baton")
            agent = self._agent(client, slots)
            server = ApiServer(
                store,
                agent.connector,
                token=self._config.settings.token,
                conversions={_GROUPS: convert},
                validators={_GROUPS: lambda new, _: api.validate(new), _LEADER_WORKER_SETS: lws_validation.validate},
                mutators={_LEADER_WORKER_SETS: lws.complete},
                service_network=f"127.{slots.addresses.octet}.224.0/19",
            )
            serving = await serve(server, HOST, port)
            stack.push_async_callback(serving.close)
            await stack.enter_async_context(client)
            await install_types(client)
            await self._run_parts(client, agent, serving)
            if self._config.with_node:
                dataplane.stop(self._home)
                await stop_pods(client, slots)
                await dataplane.wait_stopped(self._home)
            logger.info("requests of the daemon itself", extra={"requests": client.num_requests})
        logger.info("stopped")

    async def _run_parts(self, client: Client, agent: NodeAgent, serving: Serving) -> None:
        """Everything that is a client, until `stop`."""
        async with asyncio.TaskGroup() as group:
            parts = [group.create_task(self._controllers(client).run(), name="controllers")]
            if self._config.with_node:
                parts.append(group.create_task(agent.run(), name="node agent"))
                listening = asyncio.Event()
                parts.append(group.create_task(dataplane.keep(self._home, listening), name="data plane"))
                await first_of(agent.ready, self._stop, *parts)
                with contextlib.suppress(TimeoutError):  # late listeners are told by their Services
                    await asyncio.wait_for(first_of(listening, self._stop, *parts), DATAPLANE_TIMEOUT_S)
            self._announce(serving, agent)
            await first_of(self._stop, *parts)
            logger.info("stopping")
            for part in parts:
                part.cancel()

    def _announce(self, serving: Serving, agent: NodeAgent) -> None:
        """The kubeconfig and the record: from now on commands find the cluster."""
        settings = self._config.settings
        write_private(self._home.kubeconfig, yaml.safe_dump(kubeconfig(serving.url, settings.token), sort_keys=False))
        isolation = agent.isolation
        record = DaemonRecord(os.getpid(), serving.url, isolation.name, isolation.note, baton.__version__)
        record.write(self._home)
        logger.info("ready", extra={"server": serving.url, "isolation": isolation.name, "home": str(self._home.root)})

    def _controllers(self, client: Client) -> Runner:
        directories = ClaimDirectories(self._home)

        def source(claim: api.Object) -> api.Object:
            found = default_source(claim, directories, self._home.volumes)
            if "hostPath" in found:
                Path(found["hostPath"]["path"]).mkdir(parents=True, exist_ok=True)
            return found

        return Runner(client, [*our_controllers(), *builtin_controllers(source)])

    def _agent(self, client: Client, slots: SlotStore) -> NodeAgent:
        model = self._config.demo_model
        config = NodeConfig(
            home=self._home.root,
            isolation=self._config.settings.isolation,  # type: ignore[arg-type]
            volumes=ClaimDirectories(self._home),
            default_volume=None if model is None else lambda: model,
            with_services=False,
        )
        return NodeAgent(client, config, slots)


async def install_types(client: Client) -> None:
    """Our kinds, as they are in this version; objects of an older one are converted as they are read."""
    for crd in api.crd_manifests():
        name = crd["metadata"]["name"]
        await client.patch(CUSTOM_RESOURCE_DEFINITIONS, name, None, crd, kind="apply", force=True)


def convert(obj: api.Object, api_version: str) -> api.Object:
    return api.convert(obj, api_version.rpartition("/")[2])


def free_port() -> int:
    with socket.socket() as one:
        one.bind((HOST, 0))
        return int(one.getsockname()[1])


async def first_of(*waited: asyncio.Event | asyncio.Task[None]) -> None:
    """Return when one of the events is set; raise when one of the tasks failed or ended, which none should."""
    events = [asyncio.ensure_future(one.wait()) for one in waited if isinstance(one, asyncio.Event)]
    tasks = [one for one in waited if isinstance(one, asyncio.Task)]
    try:
        done, _ = await asyncio.wait({*events, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for event in events:
            event.cancel()
    for task in tasks:
        if task in done:
            task.result()
            raise RuntimeError(f"{task.get_name()} ended by itself")


async def run_until_signal(config: DaemonConfig) -> None:
    daemon = Daemon(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, daemon.stop)
    await daemon.run()


def main(argv: list[str] | None = None) -> int:
    """Run a daemon until a signal; 1 with one line on stderr when it cannot start."""
    parser = argparse.ArgumentParser(prog="python -m baton.cluster.daemon", description=__doc__)
    parser.add_argument("--home", type=Path, help="state directory [default: $BATON_HOME or ~/.baton]")
    parser.add_argument("--demo-model", type=Path, help="directory for claims that have none")
    parser.add_argument("--no-node", action="store_true", help="run no pods: something else plays the kubelet")
    arguments = parser.parse_args(argv)
    configure_logging()
    try:
        home = ClusterHome.find(arguments.home)
        with home.held():
            home.record_file.unlink(missing_ok=True)
            settings = Settings.read(home)
            if not port_is_free(settings.api_port):
                settings = replace(settings, api_port=free_port())
            settings.write(home)
            config = DaemonConfig(home, settings, arguments.demo_model, with_node=not arguments.no_node)
            uvloop.run(run_until_signal(config))
            home.record_file.unlink(missing_ok=True)
    except (HomeError, IsolationError, OSError) as error:
        sys.stderr.write(f"{CANNOT_START}{error}\n")
        return 1
    return 0


def port_is_free(port: int) -> bool:
    if port == 0:
        return False
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((HOST, port))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
