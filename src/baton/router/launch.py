"""Programs of this room: `baton router`, and the two names under which manifests start it (mini_lb, launch_router)."""

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Sequence

import uvloop

from baton.router.app import Router
from baton.router.args import BATON, LAUNCH_ROUTER, MINI_LB, Flavour, parse_args
from baton.router.config import RouterConfig
from baton.text.errors import ModelError

log = logging.getLogger("baton.router")
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}


def router_main(argv: Sequence[str], flavour: Flavour = BATON) -> int:
    """Run a router until SIGTERM or SIGINT; the exit status. Bad flags exit with 2 through SystemExit."""
    config, notes = parse_args(argv, flavour)
    logging.basicConfig(
        level=_LEVELS[config.log_level], format="[%(asctime)s] %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"
    )
    for note in notes:
        log.warning("%s", note)
    try:
        uvloop.run(serve(config))
    except ModelError as error:
        sys.stderr.write(f"{flavour.prog}: --tokenizer-path: {error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"{flavour.prog}: cannot listen on {config.host}:{config.port}: {error}\n")
        return 1
    return 0


def mini_lb_main(argv: Sequence[str]) -> int:
    """`python3 -m sglang.srt.disaggregation.mini_lb`."""
    return router_main(argv, MINI_LB)


def launch_router_main(argv: Sequence[str]) -> int:
    """`python3 -m sglang_router.launch_router`."""
    return router_main(argv, LAUNCH_ROUTER)


main = router_main
"""The name that `baton.cli` and the stand-ins import."""


async def serve(config: RouterConfig) -> None:
    """Until a signal: the first stops accepting and lets requests end, a second one ends them."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    hurry = asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    router = Router(config)
    await router.start()
    log.info(
        "router listens host=%s port=%d mode=%s protocol=%s workers=%d",
        config.host, router.port, "pd" if config.pd else "regular", config.pd_protocol or "as the workers'", len(config.workers),
    )  # fmt: skip
    await stop.wait()
    log.info("router stops: requests in progress may end grace_s=%g", config.shutdown_grace_s)
    stopping = loop.create_task(router.stop())
    waiting = loop.create_task(hurry.wait())
    await asyncio.wait((stopping, waiting), return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        for exchange in list(router.core.exchanges):
            exchange.shut_down()
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    await stopping
    log.info("router has stopped")


if __name__ == "__main__":
    sys.exit(router_main(sys.argv[1:]))
