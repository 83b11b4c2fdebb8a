"""What srun tells each of the processes that it starts, in the words of torchrun."""

from __future__ import annotations

import re
from collections.abc import Mapping

from firstsight.errors import UserError

_PORTS = 20_000
_FIRST_PORT = 12_000
"""Ports from here on, below those that systems hand out by themselves (32768 on Linux)."""


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT of a task of srun.

    Empty where srun did not start this process, or torchrun did (below srun or not). A batch script
    without srun is one process, however many tasks its job has. Address and port that are set
    already stay. Raises `UserError` where machines have different numbers of tasks.
    """
    if "WORLD_SIZE" in environment or "SLURM_PROCID" not in environment:
        return {}
    if environment.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environment:
        return {}

    def told(*names: str, otherwise: str) -> str:
        return next((environment[name] for name in names if name in environment), otherwise)

    tasks = told("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS", otherwise="1")
    if int(tasks) < 2:
        return {}
    nodes = hosts(
        told("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST", otherwise="localhost")
    )
    told_each = told("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", otherwise="")
    each = int(tasks) // len(nodes)
    if each * len(nodes) != int(tasks) or set(_counts(told_each)) - {each}:
        raise UserError(
            f"SLURM put {tasks} tasks on {len(nodes)} machines ({told_each or 'unequally'}); "
            "use --ntasks-per-node, the same number on each"
        )
    job, step = (
        told("SLURM_JOB_ID", "SLURM_JOBID", otherwise="0"),
        told("SLURM_STEP_ID", "SLURM_STEPID", otherwise="0"),
    )
    port = _FIRST_PORT + (int(job) + 997 * int(step)) % _PORTS
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": told("SLURM_LOCALID", otherwise=str(int(environment["SLURM_PROCID"]) % each)),
        "LOCAL_WORLD_SIZE": str(each),
        "MASTER_ADDR": told("MASTER_ADDR", otherwise=nodes[0]),
        "MASTER_PORT": told("MASTER_PORT", otherwise=str(port)),
    }


def hosts(nodes: str) -> list[str]:
    """The machines of a list as SLURM writes it: `gpu[01-03,7],login` are five."""
    found: list[str] = []
    for entry in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        names = [""]
        for text, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", entry):
            parts = [text] if text else [n for part in ranges.split(",") for n in _range(part)]
            names = [name + part for name in names for part in parts]
        found += names
    return found


def _range(text: str) -> list[str]:
    first, _, last = text.partition("-")
    return [f"{n:0{len(first)}}" for n in range(int(first), int(last or first) + 1)]


def _counts(text: str) -> list[int]:
    """Tasks on each machine: `4(x2),3` are 4, 4 and 3."""
    pairs = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in pairs for _ in range(int(times or 1))]
