"""Seconds and memory to open a zip archive of as many members as ImageNet has.

    python benchmarks/zip_open.py [--members 1280000]

The archive is made in a temporary folder (some 250 MB with its map): 1,000 folders, names as long
as those of ImageNet, a byte in each member. A process of its own opens it for each row, as a run
does: its directory is read, and the map checked against it line by line. Seconds are wall clock
and CPU; memory is the peak of the whole process, interpreter and libraries included. Wanted: 10 s
and 400 MiB.
"""

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

OPEN = """
import json, resource, sys, time
from firstsight.sources import open_source
import firstsight.sources.zip
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
wall, cpu = time.perf_counter(), time.process_time()
source = open_source(sys.argv[1])
found = {"images": len(source), "classes": len(source.classes)}
found |= {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
found |= {"mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "before": before / 1024}
print(json.dumps(found))
"""


def archive(path: Path, members: int) -> None:
    """A zip with 64-bit ends, and its map beside it."""
    size = 0
    body = b"x"
    crc = zlib.crc32(body)
    entry, local = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
    lines = path.with_name(f"{path.stem}_map.txt")
    with open(path, "wb") as file, open(f"{path}.part", "w+b") as listed, open(lines, "w") as text:
        for number in range(members):
            label = number * 1000 // members
            name = f"n{label:08}/n{label:08}_{number % 100_000}.JPEG"
            text.write(f"{name}\t{label}\n")
            raw = name.encode()
            fixed = (0, 0, 0, 33, crc, 1, 1, len(raw), 0)
            listed.write(entry.pack(b"PK\1\2", 20, 20, *fixed, 0, 0, 0, 0, size) + raw)
            size += file.write(local.pack(b"PK\3\4", 20, *fixed) + raw + body)
        length = listed.tell()
        listed.seek(0)
        while part := listed.read(1 << 24):
            file.write(part)
        end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, members, members, length, size)
        end += struct.pack("<4sLQL", b"PK\6\7", 0, size + length, 1)
        low = min(members, 0xFFFF)
        file.write(end + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, low, low, length, size, 0))
    Path(f"{path}.part").unlink()


def main(typed: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Makes the archive, opens it twice, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=1_280_000)
    args = parser.parse_args(typed)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.zip"
        archive(path, args.members)
        for row in ("with its map", "without a map"):
            command = [sys.executable, "-c", OPEN, str(path)]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[row] = one = json.loads(said)
            print(
                f"{row:16}{one['images']:>10} images{one['seconds']:8.2f} s{one['cpu']:8.2f} s CPU"
                f"{one['mib']:8.0f} MiB at the peak ({one['before']:.0f} before)",
                flush=True,
            )
            path.with_name("train_map.txt").unlink(missing_ok=True)
    return found


if __name__ == "__main__":
    main()
