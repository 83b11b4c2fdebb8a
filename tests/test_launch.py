"""Processes that find each other: under SLURM, and on machines of which the first is told all."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks.rough_weather import TINY
from firstsight import cli, distributed
from firstsight.distributed import slurm
from firstsight.engine import folders
from firstsight.errors import UserError

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_JOB_NODELIST": "gpu[08-09]",
    "SLURM_TASKS_PER_NODE": "4(x2)",
}


def test_lists_of_machines():
    for text, names in {
        "localhost": ["localhost"],
        "node[01-03,07]": ["node01", "node02", "node03", "node07"],
        "a1,b[9-11],c": ["a1", "b9", "b10", "b11", "c"],
        "rack[1-2]-n[3,5].hpc": ["rack1-n3.hpc", "rack1-n5.hpc", "rack2-n3.hpc", "rack2-n5.hpc"],
    }.items():
        assert slurm.hosts(text) == names


def test_srun_says_what_torchrun_would_say():
    assert slurm.variables(STEP) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu08",
        "MASTER_PORT": str(12000 + 4711 + 2 * 997),
    }
    # a step may have fewer machines than its job, and people may know a better address
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "gpu09", "MASTER_ADDR": "ib9"}
    said = slurm.variables(STEP | step | {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_PROCID": "1"})
    assert (said["WORLD_SIZE"], said["LOCAL_WORLD_SIZE"], said["MASTER_ADDR"]) == ("2", "2", "ib9")
    ports = {slurm.variables(STEP | {"SLURM_JOB_ID": str(n)})["MASTER_PORT"] for n in (1, 2, 10**9)}
    assert len(ports) == 3 and all(1024 < int(port) < 32768 for port in ports)


def test_other_processes_of_a_job_are_alone():
    batch = {key: value for key, value in STEP.items() if key != "SLURM_STEP_ID"}
    assert slurm.variables(batch | {"ENVIRONMENT": "BATCH", "SLURM_PROCID": "0"}) == {}
    assert slurm.variables(STEP | {"ENVIRONMENT": "BATCH"}) != {}  # srun in such a script
    assert slurm.variables({"SLURM_NTASKS": "8"}) == {}  # the shell of salloc
    assert slurm.variables(STEP | {"WORLD_SIZE": "1"}) == {}  # torchrun below srun
    assert slurm.variables(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) == {}  # srun --pty bash
    with pytest.raises(UserError, match="--ntasks-per-node"):
        slurm.variables(STEP | {"SLURM_TASKS_PER_NODE": "5,3"})


def test_cores_are_those_of_the_task_or_shared_out_below_torchrun(monkeypatch):
    def cores(here, **environment):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(here), raising=False)
        with monkeypatch.context() as changed:
            for name, value in environment.items():
                changed.setenv(name, value)
            return distributed.cores()

    assert cores(12, SLURM_CPUS_PER_TASK="12", LOCAL_WORLD_SIZE="4") == 12  # bound to its own
    assert cores(48, SLURM_CPUS_PER_TASK="12", LOCAL_WORLD_SIZE="4") == 12  # not bound
    below = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "4"}
    assert cores(48, SLURM_CPUS_PER_TASK="48", **below) == 12
    assert cores(48) == 48


def under_srun(rank, port):
    """Join as a task of srun does, with its variables and no others."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        os.environ.pop(name, None)
    told = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2"}
    told |= {"SLURM_JOB_NODELIST": "localhost", "SLURM_TASKS_PER_NODE": "2"}
    os.environ.update(STEP | told | {"SLURM_CPUS_PER_TASK": "1", "MASTER_PORT": str(port)})
    distributed.start("cpu")
    try:
        place = (distributed.rank(), distributed.local_rank(), distributed.machines())
        total = distributed.summed(torch.tensor(1.0 + rank))
        return place, total.item(), torch.get_num_threads()
    finally:
        distributed.stop()


def test_two_tasks_of_srun_join(on_ranks):
    from tests.conftest import free_port

    assert on_ranks(under_srun, free_port()) == [((0, 0, 1), 3.0, 1), ((1, 1, 1), 3.0, 1)]


def lines(capsys, monkeypatch, *args):
    """What `firstsight launch` prints, and what it becomes."""
    became = []
    monkeypatch.setattr(os, "execv", lambda path, words: became.append(words))
    cli.main(["launch", *args])
    return capsys.readouterr().out.splitlines(), became[0]


def test_the_first_machine_says_what_to_type_on_the_others(capsys, monkeypatch):
    command = ["pretrain", "simclr", "--data", "my photos/", "--batch-size", "512"]
    flags = ["--machines", "3", "--devices=8", "--address", "10.0.0.1", "--port", "29500"]
    said, became = lines(capsys, monkeypatch, *flags, *command)
    assert said[1:] == [
        f"torchrun --nproc-per-node 8 --nnodes 3 --node-rank {number} --master-addr 10.0.0.1 "
        "--master-port 29500 -m firstsight pretrain simclr --data 'my photos/' --batch-size 512"
        for number in (1, 2)
    ]
    assert shlex.join(became[3:]) == said[1].replace("--node-rank 1", "--node-rank 0")[9:]
    said, became = lines(capsys, monkeypatch, "--machines", "2", *command)
    found = re.search(r"--master-addr (\S+) --master-port (\d+)", said[1])
    assert not found[1].startswith("127.") and int(found[2]) > 1023
    said, became = lines(capsys, monkeypatch, *command)
    assert said == [] and became[3:6] == ["--standalone", "--nproc-per-node", "gpu"]
    for wrong, sentence in ((["--machines", "2"], "launch what"), (["--devices", "-1", "x"], "-1")):
        with pytest.raises(SystemExit) as error:
            cli.main(["launch", *wrong])
        assert error.value.code == 2 and sentence in capsys.readouterr().err


def on_another_machine(rank, folder):
    distributed.start("cpu")
    try:
        folders.require_shared(folder / "everywhere")
        with (
            mock.patch.object(folders.time, "sleep"),  # this process serves other tests, too
            pytest.raises(UserError, match="not the same folder on all machines"),
        ):
            folders.require_shared(folder / f"only-{rank}" if rank else folder / "everywhere")
    finally:
        distributed.stop()


def test_a_run_folder_that_machines_do_not_share_is_refused(on_ranks, tmp_path):
    (tmp_path / "everywhere").touch()
    on_ranks(on_another_machine, tmp_path)


@pytest.mark.slow
def test_two_machines_train_by_the_lines_that_the_first_one_prints(tmp_path):
    """Two agents of torchrun on this one; the second is started by what the first printed."""
    command = (
        "pretrain simclr --data scenes:train@16 --backbone timm:test_resnet --size 32 --epochs"
    )
    command += " 1 --batch-size 8 --workers 0 --threads 1 --device cpu --precision fp32 --optimizer"
    command += f" sgd --layout contiguous --probe none --out {tmp_path}/run"
    flags = ["--machines", "2", "--devices", "1", "--address", "127.0.0.1"]
    launch = [sys.executable, "-m", "firstsight", "launch", *flags, *command.split()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(launch, env=environment, **pipes) as first:
        first.stdout.readline()
        line = shlex.split(first.stdout.readline())
        assert line[0] == "torchrun"
        torchrun = [sys.executable, "-m", "torch.distributed.run", *line[1:]]
        with subprocess.Popen(torchrun, env=environment, **pipes) as second:
            said = [process.communicate(timeout=240)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 2
    assert sorted(beat["rank"] for beat in beats(tmp_path / "run")) == [0, 1]


SRUN = """#!{python}
import os, subprocess, sys
told = dict(SLURM_STEP_ID="0", SLURM_NTASKS="2", SLURM_JOB_NODELIST="localhost")
told |= dict(SLURM_TASKS_PER_NODE="2", SLURM_CPUS_PER_TASK="1", PYTHONPATH={path!r})
words = [sys.executable, "-m", *sys.argv[1:], *{more!r}]
tasks = []
for task in "01":
    place = dict(SLURM_PROCID=task, SLURM_LOCALID=task)
    tasks.append(subprocess.Popen(words, env=os.environ | told | place))
sys.exit(max(task.wait() for task in tasks))
"""


def beats(out):
    """The heartbeats of a run."""
    return [json.loads(path.read_text()) for path in (out / "watch").glob("*.json")]


@pytest.mark.slow
def test_the_script_for_slurm_queues_a_run_again_that_was_asked_to_stop(tmp_path):
    """As docs/cluster.md has it, but smaller; srun is one of ours that starts two real tasks."""
    page = (Path(__file__).parents[1] / "docs/cluster.md").read_text()
    script = re.search(r"^(#!/bin/bash\n#SBATCH.*?)^```", page, re.M | re.S)[1]
    (tmp_path / "pretrain.sbatch").write_text(script)
    more = [*TINY, "--epochs", "12", "--workers", "0", "--save-every", "500", "--log-every", "50"]
    fakes = {"srun": SRUN.format(python=sys.executable, path=os.pathsep.join(sys.path), more=more)}
    fakes["scontrol"] = '#!/bin/bash\necho "$@" >> asked\n'
    for name, text in fakes.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SLURM_JOB_ID": str(os.getpid())}
    out, job = tmp_path / "runs/slurm", ["bash", "pretrain.sbatch"]
    with subprocess.Popen(job, env=environment, cwd=tmp_path, stderr=subprocess.PIPE) as process:
        while min([beat["step"] for beat in beats(out)], default=0) < 5:
            time.sleep(0.05)
            assert process.poll() is None, process.communicate()
        for beat in beats(out):  # as srun hands it on to all tasks
            os.kill(beat["pid"], signal.SIGUSR1)
        _, err = process.communicate(timeout=60)
    assert (tmp_path / "asked").exists(), err
    assert (tmp_path / "asked").read_text() == f"requeue {os.getpid()}\n"
    last = torch.load(out / "checkpoints/last")["step"]
    assert 5 <= last < 50  # before the first line of the log, and until it is known how long one is
    subprocess.run(job, env=environment, cwd=tmp_path, check=True, capture_output=True)
    assert json.loads((out / "summary.json").read_text())["steps"] == 96
    assert (tmp_path / "asked").read_text().count("requeue") == 1
