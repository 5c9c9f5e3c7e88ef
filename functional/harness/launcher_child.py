"""The process of `launcher.py`: has all of the agent imported, and forks it on demand.

Run as the service's user, by `python -c`, for that user cannot read the checkout. Its standard
input is a socket: each message is an argument vector in JSON with a descriptor for the output,
and the answer to it is a pid. It ends with the other end of the socket.
"""

import gc
import importlib
import json
import os
import pkgutil
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import agent.cli
import agent.main

# What the libraries import by name, once the agent runs.
_LATE = (
    "anyio._backends._asyncio",
    "glanceclient.v2.client",
    "keystoneauth1.loading._plugins.noauth",
    "pydantic.v1",
    "uvicorn.lifespan.off",
    "uvicorn.loops.asyncio",
    "uvicorn.protocols.http.h11_impl",
)


def main() -> None:
    for package in ("agent", "privsep"):
        for module in pkgutil.walk_packages(
            importlib.import_module(package).__path__, package + "."
        ):
            importlib.import_module(module.name)
    for late in _LATE:
        importlib.import_module(late)
    # The garbage collector of a fork would write to all of it, and so copy it.
    gc.collect()
    gc.freeze()
    wishes = socket.socket(fileno=0)
    wishes.sendall(b"ready")
    while True:
        message, descriptors, _, _ = socket.recv_fds(wishes, 1 << 16, 1)
        if not message:
            return
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        pid = os.fork()
        if pid == 0:
            wishes.close()
            _become(json.loads(message), descriptors[0])
        os.close(descriptors[0])
        wishes.sendall(str(pid).encode())


def _become(arguments: list[str], output: int) -> NoReturn:
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    # The interpreter's own way out, with its wait for threads.
    sys.exit(agent.cli.main(arguments[1:], prog_name="bootwright"))


main()
