"""`baton operator`: parses flags, loads the kubeconfig, runs `baton.controllers.runner.operator`, prints how it ended."""

import asyncio
import logging
from pathlib import Path
from typing import Annotated

import typer

from baton.cluster.logfmt import configure_logging
from baton.cluster_client import ClientError, load_config
from baton.controllers.runner.operator import OperatorOptions, run_operator


def operator(
    kubeconfig: Annotated[
        Path | None, typer.Option(help="kubeconfig file; default: $KUBECONFIG, the pod's account, ~/.kube/config")
    ] = None,
    context: Annotated[str | None, typer.Option(help="context of the kubeconfig; default: its current one")] = None,
    namespace: Annotated[str | None, typer.Option(help="watch only this namespace; default: all")] = None,
    listen: Annotated[str, typer.Option(help="HOST:PORT of /healthz, /readyz and /metrics")] = "127.0.0.1:8081",
    leader_elect: Annotated[bool, typer.Option(help="let only one copy be active, by a Lease")] = True,
    lease_namespace: Annotated[str | None, typer.Option(help="namespace of the Lease; default: the context's")] = None,
    workers: Annotated[int, typer.Option(min=1, help="groups reconciled at the same time")] = 4,
    install_crds: Annotated[
        bool, typer.Option("--install-crds", help="create our CRDs where they are missing")
    ] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error")] = "info",
) -> None:
    """Run the RoleBasedGroup controller against a Kubernetes API server."""
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit():
        raise typer.BadParameter(f"--listen {listen!r} is not HOST:PORT")
    if log_level.lower() not in ("debug", "info", "warning", "error"):
        raise typer.BadParameter(f"--log-level {log_level!r} is not one of debug, info, warning, error")
    configure_logging(logging.getLevelNamesMapping()[log_level.upper()])
    try:
        config = load_config(kubeconfig, context)
        options = OperatorOptions(
            listen_host=host.strip("[]"),
            listen_port=int(port),
            namespace=namespace,
            leader_elect=leader_elect,
            lease_namespace=lease_namespace or config.namespace,
            num_workers=workers,
            install_crds=install_crds,
        )
        asyncio.run(run_operator(config, options))
    except (ClientError, OSError) as error:
        typer.echo(f"baton operator: {error}", err=True)
        raise typer.Exit(1) from None
