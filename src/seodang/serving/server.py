"""Serve a release: its GGUF in llama.cpp's server, with a chat page and the OpenAI-compatible API.

    seodang serve runs/cs/release

The release is verified before anything is started. llama.cpp's server (xllamacpp) runs as threads
of this process, so whatever ends the process leaves no other one and no open port behind.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from seodang.artifact import Artifact, FileEntry
from seodang.errors import InputError, WorkFailed
from seodang.machine import available_cores
from seodang.progress import say

CHAT_PAGE = Path(__file__).parent / "chat"
CONVERSATIONS = 4
"""How many conversations are answered at the same time; more of them wait for their turn."""
CONTEXT = 4096
"""Tokens of a conversation, at most, unless the model was made for fewer."""

_PROMPT_CACHE_MIB = 256
_ERRORS_ONLY = 1


@dataclass(frozen=True)
class Service:
    """A model that is being served: its name, its file in the release, and where it answers."""

    model: str
    file: str
    chat: str
    api: str


def announce(service: Service) -> None:
    """Tell the person who started the server where it answers."""
    say(f"Serving {service.model} ({service.file})")
    say(f"  chat page    {service.chat}")
    say(f"  OpenAI API   {service.api}")
    say("Press Ctrl-C to stop.")


def serve(
    release: Path,
    *,
    public_key: Path,
    quantization: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    context: int = CONTEXT,
    threads: int | None = None,
    ready: Callable[[Service], None] = announce,
) -> NoReturn:
    """Verify ``release``, serve it, and end the process (exit code 0) on SIGINT or SIGTERM.

    ``quantization`` names the GGUF by the end of its name (``q8_0``); by default the smallest one
    is served. ``port`` 0 takes a free one. ``context`` is the length of a conversation in tokens
    (never more than the model was made for). ``ready`` is called once requests are answered. Must
    be called from the main thread, which is where signals arrive.

    Raises ``InputError`` if the release has no such GGUF, if the address cannot be used or if
    xllamacpp is not installed, and ``WorkFailed`` if the release does not verify or llama.cpp
    cannot load it. Nothing is left running in any of these cases.
    """
    from seodang.release.verify import verify

    if importlib.util.find_spec("xllamacpp") is None:
        raise InputError("serving needs xllamacpp: pip install 'seodang[serve]'")
    address = _check_address(host, port)
    if problems := verify(release, public_key):
        raise WorkFailed(
            f"{release}: not served, it is not what was signed:\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )
    manifest = Artifact.open(release, "release").manifest
    chosen = _choose_gguf(release, manifest.files, quantization)
    model = str(manifest.config.get("name") or release.resolve().name)
    parameters = _parameters(
        model=release / chosen.path,
        name=model,
        about=_about(release, manifest.config),
        host=str(address),
        port=port,
        context=context,
        threads=threads or available_cores(),
    )
    with _stop_requested() as stop:
        server = _start(parameters, release / chosen.path)
        url = _reachable_url(server.listening_address)
        if not address.is_loopback:
            say(
                f"Listening on {address}: whoever reaches it can use the model, without a password."
            )
        ready(Service(model=model, file=chosen.path, chat=f"{url}/", api=f"{url}/v1"))
        stop.wait()
        # Closing the server instead would wait for every client that is still being answered.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _choose_gguf(release: Path, files: list[FileEntry], quantization: str | None) -> FileEntry:
    """The smallest GGUF of the release, or the one whose name ends in ``quantization``."""
    ggufs = [entry for entry in files if entry.path.endswith(".gguf")]
    if not ggufs:
        raise InputError(f"{release}: holds no GGUF file, which is what llama.cpp serves")
    if quantization is None:
        return min(ggufs, key=lambda entry: (entry.size, entry.path))
    for entry in ggufs:
        stem = Path(entry.path).stem.lower()
        wanted = quantization.lower()
        if stem == wanted or stem.endswith((f"-{wanted}", f".{wanted}")):
            return entry
    present = ", ".join(entry.path for entry in ggufs)
    raise InputError(f"{release}: no GGUF in {quantization!r}; this release has {present}")


def _about(release: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What the chat page says of the model: description, licence and questions to begin with."""
    try:
        samples = json.loads((release / "evaluation" / "samples.json").read_bytes())
    except FileNotFoundError:
        samples = []
    return {
        "description": config.get("description") or "",
        "license": config.get("license") or "",
        "prompts": [sample["prompt"] for sample in samples][:4],
    }


def _check_address(host: str, port: int) -> IPv4Address | IPv6Address:
    """The address to listen on; one that cannot be used is refused before any work is done."""
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port}: a port is a number from 0 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (socket.gaierror, UnicodeError):
        raise InputError(f"--host {host}: not a name or an address of this machine") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = (
                f"--port {port}: another program listens on {host}:{port}; "
                "stop it, choose another port, or use --port 0 for a free one"
            )
        elif error.errno == errno.EACCES:
            message = f"--port {port}: needs administrator rights; choose one from 1024 on"
        elif error.errno == errno.EADDRNOTAVAIL:
            message = f"--host {host}: not an address of this machine"
        else:
            message = f"cannot listen on {host}:{port}: {error.strerror}"
        raise InputError(message) from None
    return ip_address(address[0])


def _parameters(
    *,
    model: Path,
    name: str,
    about: dict[str, Any],
    host: str,
    port: int,
    context: int,
    threads: int,
) -> Any:
    """The ``CommonParams`` of xllamacpp for one release."""
    from xllamacpp import CommonParams

    parameters = CommonParams()
    parameters.model.path = str(model)
    parameters.model_alias = {name}
    parameters.hostnames = [host]
    parameters.port = port
    parameters.n_ctx = context * CONVERSATIONS
    parameters.n_parallel = CONVERSATIONS
    parameters.cpuparams.n_threads = threads
    parameters.cpuparams_batch.n_threads = threads
    parameters.cache_ram_mib = _PROMPT_CACHE_MIB
    parameters.verbosity = _ERRORS_ONLY
    parameters.enable_reasoning = 0  # a model of two modes thinks when a request says so
    parameters.endpoint_slots = False  # would show everyone's conversations to everyone
    parameters.cors_origins = ""  # pages of other sites may not read answers
    parameters.cors_credentials = False
    parameters.public_path = str(CHAT_PAGE)
    parameters.ui_config_json = json.dumps({"seodang": about})  # the page reads it from /props
    return parameters


def _start(parameters: Any, gguf: Path) -> Any:
    from xllamacpp import Server

    try:
        return Server(parameters)
    except RuntimeError:
        raise WorkFailed(
            f"{gguf}: llama.cpp could not serve this file; its own messages are above"
        ) from None


def _reachable_url(listening: str) -> str:
    """The URL that a browser on this machine opens, given the address that is listened on."""
    return listening.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


@contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; the signals' former handlers are put back after."""
    stop = threading.Event()

    def request(number: int, frame: FrameType | None) -> None:
        stop.set()

    former = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
