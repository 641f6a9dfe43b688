"""What loaders lose and repeat of an epoch when a run is killed and started again; no speed.

    python -m tests.benchmarks.interruption [--streaming-python=PYTHON] [--json=FILE]

Two hosts read an epoch of 640 records in ten batches of 64. After the sixth batch each saves the position as its loader
documents it; then it reads two batches more, which no checkpoint has, and is killed by SIGKILL. New processes, two,
four or one, read the last four batches. Counted are the records of the epoch that were trained on twice and those that
never were. A loader that resumes exactly has neither.

`ours` reads prepared data; its position is the number of rows. The `webdataset` package (extra, if it is installed)
has no position to save: its shuffle is deterministic, and it begins the epoch again. `mosaicml-streaming` has one; it
needs an environment of its own, because it pins an older numpy, and PyTorch: `--streaming-python` is that
environment's Python.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Nothing but the standard library here: the file is also run by the environment of mosaicml-streaming.
RECORDS, BATCH, SAVED, KILLED = 640, 64, 6, 8
TARS = 16
ROOT = Path(__file__).parents[2]

Keys = list[str]
# A reader yields its host's keys of each batch with the state that a checkpoint after this batch would keep.
Reader = Callable[[Path, int, int, str], Iterator[tuple[Keys, str]]]


def read_ours(place: Path, host: int, hosts: int, state: str) -> Iterator[tuple[Keys, str]]:
    """Reads prepared data by global row; the state is the next row."""
    from ecdit.data.loader import make_loader
    from ecdit.data.text import load_vocabulary

    local = BATCH // hosts
    row = int(state or 0)
    loader = make_loader(_our_config(place), 0, BATCH, row, range(host * local, (host + 1) * local))
    vocabulary = load_vocabulary(next((place / "data" / "pairs" / "tokenizers").glob("*.model")))
    for batch in loader:
        row += BATCH
        captions = [vocabulary.decode([int(token) for token in tokens if token > 1]) for tokens in batch["tokens"]]
        yield [caption.replace(" ", "") for caption in captions], str(row)


def _our_config(place: Path) -> Any:
    from tests.benchmarks.data import config_of

    pattern = str(place / "tars" / "*.tar")
    return config_of(place, "pairs", pattern, image_size=8, caption_dropout=0.0, vocab_size=300)


def read_webdataset(place: Path, host: int, hosts: int, state: str) -> Iterator[tuple[Keys, str]]:
    """Reads tars with a deterministic shuffle; there is no state."""
    import webdataset

    os.environ |= {"RANK": str(host), "WORLD_SIZE": str(hosts)}
    paths = sorted(str(path) for path in (place / "tars").glob("*.tar"))
    data = webdataset.WebDataset(
        paths, shardshuffle=TARS, seed=0, detshuffle=True, nodesplitter=webdataset.split_by_node
    )
    yield from (
        (keys, "")
        for keys in data.shuffle(100, seed=0).to_tuple("txt").map(_text).batched(BATCH // hosts, collation_fn=list)
    )


def _text(sample: tuple[bytes]) -> str:
    return sample[0].decode()


def read_streaming(place: Path, host: int, hosts: int, state: str) -> Iterator[tuple[Keys, str]]:
    """Reads MDS shards; the state is that of its data loader."""
    from streaming import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(
        local=str(place / "mds"), shuffle=True, shuffle_seed=0, batch_size=BATCH // hosts, num_canonical_nodes=2
    )
    loader = StreamingDataLoader(data, batch_size=BATCH // hosts)
    if state:
        loader.load_state_dict(json.loads(state))
    for batch in loader:
        yield list(batch["caption"]), json.dumps(loader.state_dict())


READERS: dict[str, Reader] = {"ours": read_ours, "webdataset": read_webdataset, "streaming": read_streaming}


def write_data(place: Path, streaming_python: str | None) -> None:
    """Writes the records as tars, as prepared data and, for mosaicml-streaming, as MDS. Captions are their keys."""
    import io

    import numpy as np
    from PIL import Image

    from ecdit.data.prepared import prepare

    (place / "tars").mkdir()
    random = np.random.default_rng(0)
    for tar_index in range(TARS):
        with tarfile.open(place / "tars" / f"{tar_index:02d}.tar", "w") as tar:
            for i in range(tar_index * RECORDS // TARS, (tar_index + 1) * RECORDS // TARS):
                image = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(image, "PNG")
                for name, content in ((f"{i:04d}.png", image.getvalue()), (f"{i:04d}.txt", f"{i:04d}".encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    prepare(_our_config(place), say=lambda _: None)
    if streaming_python:
        subprocess.run([streaming_python, __file__, "--write-mds", str(place)], check=True)


def write_mds(place: Path) -> None:
    """Writes the captions as MDS; runs in the environment of mosaicml-streaming."""
    from streaming import MDSWriter

    with MDSWriter(out=str(place / "mds"), columns={"caption": "str"}, size_limit=RECORDS // TARS * 20) as writer:
        for i in range(RECORDS):
            writer.write({"caption": f"{i:04d}"})


def run_host(reader: str, place: Path, host: int, hosts: int, state: str) -> None:
    """Prints a line a batch, and waits to be killed."""
    for keys, after in READERS[reader](place, host, hosts, state):
        print(json.dumps([keys, after]), flush=True)
    time.sleep(600)


def read_hosts(python: str, reader: str, place: Path, states: list[str], batches: int) -> list[list[tuple[Keys, str]]]:
    """Starts a process a host, reads so many batches of each, kills them all; returns what each host read."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    hosts = len(states)
    processes = []
    for host, state in enumerate(states):
        ranks = {"RANK": host, "LOCAL_RANK": host, "WORLD_SIZE": hosts, "LOCAL_WORLD_SIZE": hosts, "MASTER_PORT": port}
        variables = {name: str(value) for name, value in ranks.items()} if reader == "streaming" else {}
        command = [python, "-W", "ignore", __file__, f"--host={host}", f"--hosts={hosts}", f"--read={reader}"]
        processes.append(
            subprocess.Popen(
                [*command, f"--place={place}", f"--state={state}"],
                env=os.environ | {"MASTER_ADDR": "localhost", "PYTHONPATH": str(ROOT), **variables},
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
    try:
        return [[json.loads(next(iter(process.stdout))) for _ in range(batches)] for process in processes]
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()


def interrupted(python: str, reader: str, place: Path, hosts_after: int) -> dict[str, int]:
    """Returns how many records of the epoch were trained on twice or more, and how many never."""
    before = read_hosts(python, reader, place, [""] * 2, KILLED)
    trained = [key for host in before for keys, _ in host[:SAVED] for key in keys]
    state = before[0][SAVED - 1][1]
    after = read_hosts(python, reader, place, [state] * hosts_after, RECORDS // BATCH - SAVED)
    trained += [key for host in after for keys, _ in host for key in keys]
    assert len(trained) == RECORDS, f"{reader} read {len(trained)} records"
    return counted(trained)


def counted(keys: Keys) -> dict[str, int]:
    """Returns how many of the epoch's records are there more than once, and how many are not."""
    counts = Counter(keys)
    return {"repeated": sum(count > 1 for count in counts.values()), "lost": RECORDS - len(counts)}


def main() -> None:
    """Prints a table of what each loader that is installed repeats and loses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streaming-python", help="Python of an environment with mosaicml-streaming and torch")
    parser.add_argument("--only", choices=READERS, action="append", help="a loader; default: all that are installed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write-mds", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--read", choices=READERS, help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    for name in ("host", "hosts"):
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--state", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write_mds:
        write_mds(arguments.write_mds)
    elif arguments.read:
        run_host(arguments.read, arguments.place, arguments.host, arguments.hosts, arguments.state)
    else:
        report(arguments)


def report(arguments: argparse.Namespace) -> None:
    """Interrupts every loader with each number of hosts, and prints and keeps what came of it."""
    import importlib.util

    wanted = arguments.only or [
        "ours",
        *(["webdataset"] if importlib.util.find_spec("webdataset") else []),
        *(["streaming"] if arguments.streaming_python else []),
    ]
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        write_data(place, arguments.streaming_python if "streaming" in wanted else None)
        print("| loader | hosts before, after | trained on twice | never |\n|---|---|---|---|")
        for reader in wanted:
            python = arguments.streaming_python if reader == "streaming" else sys.executable
            for hosts in (2, 4, 1):
                counts = found[f"{reader}, 2 to {hosts}"] = interrupted(python, reader, place, hosts)
                print(f"| {reader} | 2, {hosts} | {counts['repeated']} | {counts['lost']} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
