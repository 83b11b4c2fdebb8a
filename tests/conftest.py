"""Ranks for the tests: processes that are started once, since importing torch costs seconds."""

import multiprocessing
import os
import socket
import traceback

import pytest
import torch


@pytest.fixture(autouse=True)
def threads_as_before():
    """A run sets how many threads torch takes, and sums come out otherwise with more of them."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _serve(rank, calls):
    torch.set_num_threads(1)
    before = dict(os.environ)
    while True:
        try:
            world, port, function, arguments = calls.recv()
        except EOFError:
            return
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        try:
            calls.send((True, function(rank, *arguments)))
        except BaseException:  # whatever it was, the test that asked must see it
            calls.send((False, traceback.format_exc()))
        os.environ.clear()
        os.environ.update(before)


class Ranks:
    """Processes that wait for work; after a failure new ones, since old ones may hang."""

    def __init__(self):
        self.running = []

    def _more(self):
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(len(self.running), theirs))
        process.start()
        theirs.close()
        self.running.append((process, ours))

    def __call__(self, function, *arguments, world=2, seconds=240):
        """What `function(rank, *arguments)` returned on each rank; torchrun's variables are set."""
        while len(self.running) < world:
            self._more()
        port = free_port()
        for _, calls in self.running[:world]:
            calls.send((world, port, function, arguments))
        answers = []
        for rank, (_, calls) in enumerate(self.running[:world]):
            try:
                well, answer = calls.recv() if calls.poll(seconds) else (False, "no answer")
            except EOFError:
                well, answer = False, "the process is gone"
            if not well:
                self.end()
                pytest.fail(f"rank {rank}: {answer}")
            answers.append(answer)
        return answers

    def end(self):
        for process, calls in self.running:
            calls.close()
            process.join(2)
            process.kill()
            process.join()
        self.running = []


@pytest.fixture(scope="session")
def on_ranks():
    """Run a function of a test module on several ranks: on_ranks(function, *arguments, world=2)."""
    ranks = Ranks()
    yield ranks
    ranks.end()
