"""`firstsight launch`: torchrun on the first of several machines, and the lines for the others."""

from __future__ import annotations

import dataclasses
import os
import shlex
import socket
import sys

from firstsight.cli.flags import parsed
from firstsight.errors import UserError, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """On the first of several machines: starts it, and says what to type on the others."""

    machines: int = 1
    """M, machines that take part, this one among them."""
    devices: int = 0
    """N, processes on each machine, one for each device; 0: as many as it has GPUs."""
    address: str = ""
    """Name or address of this machine as the others reach it; empty: found out."""
    port: int = 0
    """A port of this machine that the others can reach; 0: any that is free."""

    def __post_init__(self) -> None:
        require_positive("--", self, "machines")
        if self.devices < 0 or not 0 <= self.port < 65536:
            raise UserError(
                f"--devices {self.devices} --port {self.port}: 0 or more, and no port above 65535"
            )


def launch(args: list[str]) -> None:
    """One command on many machines: firstsight launch --machines M --devices N pretrain ..."""
    own, command = _split(args)
    options = parsed(Launch, own, "launch")
    if not command:
        raise UserError("launch what? put the command behind: firstsight launch pretrain ...")
    if options.machines > 1:
        address = options.address or _address()
        options = dataclasses.replace(options, address=address, port=options.port or _free_port())
        print("on the other machines, where --data and --out are the same folders as here:")
        for number in range(1, options.machines):
            print(shlex.join(["torchrun", *_words(options, number, command)]))
        sys.stdout.flush()
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    os.execv(sys.executable, [*torchrun, *_words(options, 0, command)])


def _split(args: list[str]) -> tuple[list[str], list[str]]:
    """Flags of launch, and the command: from the first word that is neither flag nor value."""
    at = 0
    while at < len(args) and args[at].startswith("-"):
        at += 1 if "=" in args[at] or args[at] in ("-h", "--help") else 2
    return args[:at], args[at:]


def _words(options: Launch, number: int, command: list[str]) -> list[str]:
    """What follows torchrun on machine `number`."""
    words = ["--nproc-per-node", str(options.devices or "gpu")]
    if options.machines == 1:
        return ["--standalone", *words, "-m", "firstsight", *command]
    words += ["--nnodes", str(options.machines), "--node-rank", str(number)]
    words += ["--master-addr", options.address, "--master-port", str(options.port)]
    return [*words, "-m", "firstsight", *command]


def _address() -> str:
    """The address of this machine on its way out; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        try:
            out.connect(("192.0.2.1", 9))  # set aside for documentation: nobody is there
            return str(out.getsockname()[0])
        except OSError:  # no way out
            return socket.gethostname()


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("", 0))
        return int(listening.getsockname()[1])
