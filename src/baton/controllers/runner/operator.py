"""`baton operator` as a coroutine: our controllers against any API server, one active copy at a time, with health and metrics.

A copy that loses its lease ends (whoever started it starts it again): two active copies are worse than none.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from dataclasses import dataclass

from aiohttp import web

from baton.api import crd_manifests
from baton.api.crd import without_conversion
from baton.api.resources import CUSTOM_RESOURCE_DEFINITIONS
from baton.cluster_client import AlreadyExists, Client, ClusterConfig, LeaderElector
from baton.controllers.runner import our_controllers
from baton.controllers.runner.metrics import RunnerMetrics
from baton.controllers.runner.runner import Runner

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OperatorOptions:
    """``listen`` host and port of health and metrics; ``namespace`` None watches all; ``num_workers`` passes at once."""

    listen_host: str = "127.0.0.1"
    listen_port: int = 8081
    namespace: str | None = None
    leader_elect: bool = True
    lease_name: str = "baton-operator"
    lease_namespace: str = "default"
    num_workers: int = 4
    install_crds: bool = False


async def run_operator(config: ClusterConfig, options: OperatorOptions) -> None:
    """Until SIGINT or SIGTERM. Raises :class:`baton.cluster_client.LeadershipLost` when another copy took over."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with Client(config, user_agent="baton-operator") as client:
        work = asyncio.create_task(_work(client, options), name="operator")
        stopped = asyncio.create_task(stop.wait(), name="stop")
        await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not work.done():
            log.info("stopping")
            work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        if not work.cancelled() and work.exception() is not None:
            error = work.exception()
            raise error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error  # type: ignore[misc]


async def _work(client: Client, options: OperatorOptions) -> None:
    metrics = RunnerMetrics()
    runner = Runner(
        client,
        our_controllers(),
        namespace=options.namespace,
        num_workers=options.num_workers,
        component="baton-operator",
        metrics=metrics,
    )
    identity = f"{socket.gethostname()}_{os.getpid()}"
    elector = LeaderElector(client, options.lease_name, options.lease_namespace, identity)
    web_runner = await _serve(runner, elector, metrics, options)
    try:
        if options.install_crds:
            await _install_crds(client)
        if options.leader_elect:
            log.info("waiting to lead", extra={"lease": options.lease_name, "identity": identity})
            await elector.acquire()
        metrics.leader.set(1)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(runner.run(), name="runner")
                if options.leader_elect:
                    tasks.create_task(elector.hold(), name="lease")
        finally:
            metrics.leader.set(0)
            if options.leader_elect and not _lost(elector):
                await asyncio.shield(elector.release())
    finally:
        await web_runner.cleanup()


def _lost(elector: LeaderElector) -> bool:
    return bool(elector.leader) and elector.leader != elector.identity


async def _install_crds(client: Client) -> None:
    """Create our CRDs where they are missing; existing ones (of another release, or of upstream) are left as they are."""
    for crd in without_conversion(crd_manifests()):
        name = crd["metadata"]["name"]
        try:
            await client.create(CUSTOM_RESOURCE_DEFINITIONS, crd)
        except AlreadyExists:
            log.info("CRD exists", extra={"crd": name})
        else:
            log.info("CRD created", extra={"crd": name})


async def _serve(
    runner: Runner, elector: LeaderElector, metrics: RunnerMetrics, options: OperatorOptions
) -> web.AppRunner:
    """/healthz: the loop turns. /readyz: leading with full caches, or waiting to lead. /metrics: Prometheus text."""

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        if runner.is_synced or (options.leader_elect and not elector.is_leader):
            return web.Response(text="ok\n")
        return web.Response(status=503, text="caches are being filled\n")

    async def prometheus(_: web.Request) -> web.Response:
        return web.Response(body=metrics.text(), content_type="text/plain", charset="utf-8")

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", prometheus)
    web_runner = web.AppRunner(app, access_log=None)
    await web_runner.setup()
    await web.TCPSite(web_runner, options.listen_host, options.listen_port).start()
    return web_runner
