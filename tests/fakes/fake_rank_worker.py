"""A whole worker with a fake rank: the real `run_server` in this process, `FakeRank` in a child process.

`python -m tests.fakes.fake_rank_worker MODEL_DIR READY_FILE BEHAVIOUR [flags...]` with BEHAVIOUR one of: run; pause
(generates one token per sequence, then none); fatal (reports that it cannot start); crash (ends at once); slow (never ready).
READY_FILE gets "HTTP_PORT BOOTSTRAP_PORT RANK_PID" before the rank is ready.
"""

import logging
import subprocess
import sys
import threading
from pathlib import Path

from baton.engine.args import parse_engine_args
from baton.engine.server.channel import ChannelAddress, RankChannel
from baton.protocol.rank import Fatal


def rank_main(directory: str, behaviour: str, model: str) -> None:
    from tests.fakes.fake_rank import FakeRank

    from baton.engine.tokenizer import open_tokenizer

    address = ChannelAddress(directory)
    if behaviour == "crash":
        sys.exit(3)
    if behaviour == "fatal":
        channel = RankChannel(address)
        channel.send(Fatal("no such tensor: model.norm.weight"))
        channel.close()
        return
    if behaviour != "slow":
        ids = open_tokenizer(Path(model)).encode("Hello there, world!")
        rank = FakeRank(address, lambda submit: ids)
        if behaviour == "pause":
            rank.credits = 9  # the warm-up takes eight
        rank.start()
    threading.Event().wait()


def main() -> int:
    from baton.engine.server.main import EngineProcess, bind, run_server

    model, ready_file, behaviour, *flags = sys.argv[1:]
    args = parse_engine_args(["--model-path", model, *flags])
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(message)s")
    http_socket = bind(args.host, 0)
    bootstrap_socket = bind(args.host, 0) if args.disaggregation_mode == "prefill" else None
    address = ChannelAddress.create()
    command = [sys.executable, "-m", "tests.fakes.fake_rank_worker", "--rank", address.directory, behaviour, model]
    rank = subprocess.Popen(command)
    bootstrap_port = bootstrap_socket.getsockname()[1] if bootstrap_socket else 0
    Path(ready_file).write_text(f"{http_socket.getsockname()[1]} {bootstrap_port} {rank.pid}")
    try:
        engines = [EngineProcess(address, rank.pid)]
        return run_server(args, engines, http_socket=http_socket, bootstrap_socket=bootstrap_socket)
    finally:
        assert "torch" not in sys.modules, "the HTTP process must not load torch"
        rank.kill()
        rank.wait(10)
        address.remove()


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        rank_main(*sys.argv[2:])
    else:
        sys.exit(main())
