"""Exact nearest neighbours beside FAISS's exact search on the same features, in turn.

    pip install faiss-cpu
    OMP_NUM_THREADS=2 python benchmarks/knn_faiss.py [--train 50000] [--test 10000] [--k 200]

Both find the k nearest by cosine and both are given unit vectors; ours are made once more inside,
as `evaluate knn` does. FAISS's time includes filling its index. Says seconds of the wall and of the
processor (each the best of the rounds), their ratio, how much memory ours took above the features
(measured first), and how many neighbours differ: equals may.
"""

import argparse
import resource
import time
from collections.abc import Callable

import torch
from torch import Tensor

from firstsight import distributed
from firstsight.metrics import nearest


def peak_gib() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def timed(search: Callable[[], Tensor]) -> tuple[float, float, Tensor]:
    """Seconds of the wall, of the processor, and what was found."""
    began, used = time.perf_counter(), time.process_time()
    found = search()
    return time.perf_counter() - began, time.process_time() - used, found


def main() -> None:
    """Measures and prints a few lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("train", 50_000), ("test", 10_000), ("width", 512), ("k", 200)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    threads = torch.get_num_threads()
    distributed.start("cpu", threads)
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(args.train, args.width, generator=generator)
    test = torch.randn(args.test, args.width, generator=generator)
    for rows in (train, test):  # in place: the peak of memory is what the features take
        for part in rows.split(1000):
            part.div_(part.norm(dim=1, keepdim=True))

    def ours() -> Tensor:
        return torch.cat([index for _, index in nearest(train, test, args.k)])

    held = peak_gib()
    ours()
    above = peak_gib() - held

    import faiss

    faiss.omp_set_num_threads(threads)

    def theirs() -> Tensor:
        index = faiss.IndexFlatIP(args.width)
        index.add(train.numpy())
        return torch.from_numpy(index.search(test.numpy(), args.k)[1])

    rounds = [(timed(ours), timed(theirs)) for _ in range(args.rounds)]
    for what, place in (("wall", 0), ("processor", 1)):
        mine, other = (min(pair[side][place] for pair in rounds) for side in (0, 1))
        print(f"{what}: ours {mine:.2f} s, FAISS {other:.2f} s, ratio {mine / other:.2f}")
    differ = float((rounds[0][0][2] != rounds[0][1][2]).double().mean())
    print(
        f"{args.train} x {args.test} features of {args.width}, k {args.k}, {threads} threads, "
        f"best of {args.rounds} rounds; ours takes {above:.2f} GiB above the features; "
        f"{100 * differ:.3f} % of neighbours differ"
    )


if __name__ == "__main__":
    main()
