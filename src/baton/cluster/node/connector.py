"""Logs, exec, attach and port connections of the pods on this node: the agent's side of `node_connector`."""

from __future__ import annotations

import asyncio
import contextlib
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Callable

from baton.cluster.node import logs
from baton.cluster.node.container import Container
from baton.cluster.node.ended import EndedLogs
from baton.cluster.node.environment import ContainerConfigError
from baton.cluster.node.exec_session import AttachSession, ProcessSession
from baton.cluster.node.pod_worker import PodWorker
from baton.cluster.node.runtime import Runtime
from baton.cluster.node_connector import ExecSession, LogOptions, NodeError

CONNECT_TIMEOUT_S = 10.0


class AgentConnector:
    """Implements `NodeConnector` over the agent's workers."""

    def __init__(self, find: Callable[[str, str], PodWorker | None], runtime: Runtime, ended: EndedLogs) -> None:
        self._find, self._runtime, self._ended = find, runtime, ended

    async def logs(
        self, namespace: str, pod: str, container: str, options: LogOptions
    ) -> AsyncIterator[bytes]:  # fmt: skip
        one = self._container(namespace, pod, container)
        path = one.log_file(previous=options.previous)
        if options.previous and not one.has_previous:
            former = self._ended.path(namespace, pod, container)
            if former is None:
                raise NodeError(f'previous terminated container "{container}" in pod "{pod}" not found')
            path = former
        if one.process is None and not options.previous:
            state = one.snapshot().state.get("waiting") or {}
            raise NodeError(f'container "{container}" in pod "{pod}" is waiting to start: {state.get("reason")}')
        process = one.process
        async with contextlib.aclosing(
            logs.read(
                path, options,
                is_over=lambda: options.previous or process is None or process.exit is not None,
            )
        ) as chunks:  # fmt: skip
            async for chunk in chunks:
                if chunk:
                    yield chunk

    async def exec(
        self, namespace: str, pod: str, container: str, command: list[str], *, stdin: bool, tty: bool
    ) -> ExecSession:
        one = self._container(namespace, pod, container)
        if not command:
            raise NodeError("you must specify at least one command for the container")
        try:
            launch = one.enter(command)
            return await ProcessSession.start(launch, stdin=stdin, tty=tty)
        except ContainerConfigError as problem:
            raise NodeError(str(problem)) from problem
        except OSError as error:
            raise NodeError(f'exec "{command[0]}": {error.strerror or error}', code=500) from error

    async def attach(self, namespace: str, pod: str, container: str, *, stdin: bool, tty: bool) -> ExecSession:
        one = self._container(namespace, pod, container)
        if not one.is_running or one.process is None:
            raise NodeError(f"container {container} is not running")
        process = one.process
        options = LogOptions(follow=True, tail_lines=0)
        chunks = logs.read(one.log_file(), options, is_over=lambda: process.exit is not None)
        await anext(chunks, b"")  # from here on; nothing that comes before somebody listens is lost
        return AttachSession(chunks)

    async def connect(self, namespace: str, pod: str, port: int) -> tuple[StreamReader, StreamWriter]:
        worker = self._find(namespace, pod)
        if worker is None or worker.slot is None:
            raise NodeError(f"pod {namespace}/{pod} does not run on this node")
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                return await asyncio.open_connection(worker.slot.address, port)
        except TimeoutError:
            raise NodeError(f"pod {pod}: port {port} does not answer", code=500) from None
        except OSError as error:
            raise NodeError(f"pod {pod}: nothing listens on port {port} ({error.strerror})", code=500) from error

    def _container(self, namespace: str, pod: str, container: str) -> Container:
        worker = self._find(namespace, pod)
        if worker is None:
            raise NodeError(f"pod {namespace}/{pod} does not run on this node")
        one = worker.containers.get(container)
        if one is None:
            raise NodeError(f'container "{container}" of pod "{pod}" is not there yet', code=404)
        return one
