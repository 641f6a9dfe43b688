"""Measures the speed of preparing and reading data, beside upper bounds and other loaders.

    python -m tests.benchmarks.data [--runs=5] [--json=FILE] [--records=20000] [--tiny]

One core, CPU time. `latents`: latents 32 x 32 x 8 in float16 with tokens, into batches. `images`: JPEGs of 256 px from
the same tars, into batches of uint8: ours from prepared data, in a global shuffle; the `webdataset` package and tf.data
from the tars in their order, if they are installed. `prepare`: small images from tars against decoding, resizing and
encoding them alone. `resume`: seconds and memory until the first batch at row 0 and at row 10^9 of generated rows.
"""

import argparse
import dataclasses
import functools
import gc
import importlib.util
import io
import itertools
import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.benchmarks import timing

BATCH = 64
TASKS = """
from ecdit.data.sources.tars import Tars
from ecdit.data.tasks import add_task

add_task({name!r}, Tars({pattern!r}))
"""


@dataclasses.dataclass(frozen=True)
class RandomMoments:
    """Latents of 32 x 32 x 4 as an autoencoder's moments, at random."""

    name = "latents-random"
    made_by = "0" * 64
    process_bytes = 0

    def values(self, records: Iterable[Any]) -> Iterator[tuple[bytes, Mapping[str, int]]]:
        """Yields a record's moments with its size and crop."""
        from ecdit.data.record import pack

        random = np.random.default_rng(0)
        for record in records:
            moments = random.normal(size=(32, 32, 8)).astype(np.float16)
            yield pack({"latents": moments, "original_size": record.original_size, "crop": record.crop}), {}


def write_tars(directory: Path, count: int, side: int, per_tar: int) -> str:
    """Writes tars as img2dataset does, of smooth noise that compresses as photographs do; returns their pattern."""
    random = np.random.default_rng(0)
    directory.mkdir()
    for first in range(0, count, per_tar):
        with tarfile.open(directory / f"{first // per_tar:05d}.tar", "w") as tar:
            for i in range(first, min(first + per_tar, count)):
                small = Image.fromarray(random.integers(0, 256, (side // 8, side // 8, 3), np.uint8))
                image = io.BytesIO()
                small.resize((side, side), Image.Resampling.BICUBIC).save(image, "JPEG", quality=95)
                caption = " ".join(f"word{number}" for number in random.integers(0, 200, 12))
                for name, data in ((f"{i:09d}.jpg", image.getvalue()), (f"{i:09d}.txt", caption.encode())):
                    member = tarfile.TarInfo(name)
                    # webdataset's writer, which img2dataset uses, stores fractions of a second, in a PAX header.
                    member.size, member.mtime = len(data), 1.7e9 + 0.25  # pyright: ignore[reportAttributeAccessIssue]
                    tar.addfile(member, io.BytesIO(data))
    return str(directory / "*.tar")


def config_of(place: Path, name: str, pattern: str, **changes: Any) -> Any:
    """Returns the config of the task over the tars."""
    from tests.data.example import make_config

    module = place / "tasks.py"
    module.write_text(TASKS.format(name=name, pattern=pattern))
    prepare = {"image_format": "jpeg", "quality": 95, **changes.pop("prepare", {})}
    plain = {"caption_dropout": 0.1, "flip_probability": 0.0, "crop_padding": 0, "num_threads": 0}
    values = {**plain, "image_size": 256, "caption_length": 77, "vocab_size": 2048, **changes}
    return make_config(place / "data", module=str(module), task=name, prepare=prepare, **values)


def batches_of(config: Any) -> Callable[[], Any]:
    """Returns the function that reads the next batch."""
    from ecdit.data.loader import make_loader

    return functools.partial(next, make_loader(config, 0, BATCH, 0, range(BATCH)))


def webdataset_batches(pattern: str) -> Callable[[], Any]:
    """Returns the same for the webdataset package: tars in order, again and again."""
    import webdataset

    paths = sorted(str(path) for path in Path(pattern).parent.glob("*.tar"))
    data = (
        webdataset.WebDataset(paths, shardshuffle=False).decode("rgb8").to_tuple("jpg", "txt").repeat().batched(BATCH)
    )
    return functools.partial(next, iter(data))


def tf_data_batches(pattern: str) -> Callable[[], Any]:
    """Returns the same for tf.data with its own JPEG decoder, fed from the tars by Python."""
    import tensorflow as tf

    def members() -> Iterator[tuple[bytes, bytes]]:
        for path in itertools.cycle(sorted(Path(pattern).parent.glob("*.tar"))):
            with tarfile.open(path) as tar:
                found = {member.name: tar.extractfile(member).read() for member in tar}
            for name in found:
                if name.endswith(".jpg"):
                    yield found[name], found[name.replace(".jpg", ".txt")]

    spec = tf.TensorSpec((), tf.string)
    data = tf.data.Dataset.from_generator(members, output_signature=(spec, spec))
    data = data.map(lambda image, text: (tf.io.decode_jpeg(image, 3), text)).batch(BATCH)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    return functools.partial(next, data.with_options(options).as_numpy_iterator())


def cpu_seconds(batch: Callable[[], Any], count: int) -> float:
    """Returns the CPU time of a record, over `count` batches."""
    start = time.process_time()
    for _ in range(count):
        batch()
    return (time.process_time() - start) / (count * BATCH)


def measure(arguments: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Prepares the data once, and returns all cases."""
    from ecdit.data.columns import make_column
    from ecdit.data.manifest import read_records_manifest, task_directory
    from ecdit.data.prepared import prepare

    count = 512 if arguments.tiny else arguments.records // 10
    pattern = write_tars(place / "tars", count, 256, 256)
    images = config_of(place, "bench", pattern)
    prepare(images, say=lambda _: None)
    manifest = read_records_manifest(images, "bench")
    make_column(task_directory(images), manifest, RandomMoments(), 1, lambda _: None)
    latents = dataclasses.replace(images, latent_channels=4, latents="random")
    readers = {"ours": batches_of(images)}
    if importlib.util.find_spec("webdataset"):
        readers["webdataset"] = webdataset_batches(pattern)
    if importlib.util.find_spec("tensorflow"):
        readers["tf.data"] = tf_data_batches(pattern)
    calls = arguments.calls
    turns = {name: functools.partial(cpu_seconds, batch, calls) for name, batch in readers.items()}
    of_latents = {"ours": functools.partial(cpu_seconds, batches_of(latents), calls)}
    cases = {
        "images": timing.case(f"{count} JPEGs of 256 px", timing.reported_turns(turns, arguments.rounds), "ours"),
        "latents": timing.case(f"{count} of 32 x 32 x 8", timing.reported_turns(of_latents, arguments.rounds), "ours"),
    }
    for one in cases.values():
        one["records_per_cpu_second"] = {name: 1e3 / value for name, value in one["milliseconds"].items()}
    return {**cases, "prepare": preparation(place, 512 if arguments.tiny else arguments.records)}


def preparation(place: Path, count: int) -> dict[str, Any]:
    """Times preparation of small images against what it cannot do without, in turns over tars."""
    from ecdit.data import images, parts
    from ecdit.data.registry import find_task

    inner = place / "small"
    inner.mkdir()
    pattern = write_tars(inner / "tars", count, 96, max(count // 8, 1))
    config = config_of(inner, "small", pattern, image_size=64, prepare={"quality": 90})
    task, seconds, memory = find_task(config, "small"), {"ours": [], "alone": []}, []

    def alone(index: int) -> None:
        with tarfile.open(sorted((inner / "tars").glob("*.tar"))[index]) as tar:
            encoded = [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]
        start = time.process_time()
        for data in encoded:
            fitted, _ = images.fit_square(images.decode(data, "white", 10**8), 64)
            images.encode(fitted, "jpeg", 90)
        seconds["alone"].append(time.process_time() - start)

    gc.freeze()  # as processes that prepare do
    for index in range(len(task.shards)):
        alone(index)
        start = time.process_time()
        parts.write_part(config, task.read(index), task.shards[index], "", inner / f"part{index}")
        seconds["ours"].append(time.process_time() - start)
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    case = timing.case(f"{count} JPEGs of 96 px to 64 px, of {len(task.shards)} tars", seconds, "ours")
    return {**case, "megabytes_after_each_tar": memory}


FIRST_BATCH = """
import sys, time, resource
from tests.benchmarks.data import first_batch
print(first_batch(sys.argv[1], int(sys.argv[2])))
"""


def first_batch(directory: str, row: int) -> str:
    """Reads one batch of shapes from a row on; returns the seconds it took and the process's memory, as JSON."""
    from ecdit.data.loader import make_loader
    from ecdit.data.prepared import prepare
    from tests.data.example import make_config

    config = make_config(directory, task="shapes", flip_probability=0.0, crop_padding=0)
    prepare(config, say=lambda _: None)
    start = time.perf_counter()
    next(make_loader(config, 0, BATCH, row, range(BATCH)))
    seconds = time.perf_counter() - start
    return json.dumps({"seconds": seconds, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})


def resumes(place: Path) -> dict[str, Any]:
    """Returns seconds and memory until the first batch at row 0 and at row 10^9, each in a fresh process."""
    found = {}
    for row in (0, 10**9 // BATCH * BATCH):
        command = [sys.executable, "-c", FIRST_BATCH, str(place), str(row)]
        done = subprocess.run(command, cwd=timing.ROOT, env=timing.child_environment(), capture_output=True, text=True)
        found[str(row)] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measures in fresh processes and prints a line a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=20_000, help="small images that are prepared; a tenth is read")
    parser.add_argument("--tiny", action="store_true", help="few records: to try it, not to time it")
    arguments = timing.parse(parser, rounds=7, calls=8)  # a turn reads two whole tars
    if arguments.child:
        with tempfile.TemporaryDirectory() as scratch:
            Path(arguments.child).write_text(json.dumps(measure(arguments, Path(scratch))))
        return
    runs = [timing.in_fresh_process("data", arguments.quick) for _ in range(arguments.runs)]
    found = timing.summarize(runs)
    for name, one in found.items():
        print(f"{name}, {one['sizes']}: CPU time beside ours")
        for peer, ratio in one["ratios"].items():
            rates = [run[name]["records_per_cpu_second"][peer] for run in runs if "records_per_cpu_second" in run[name]]
            rate = f", {min(rates):.0f} to {max(rates):.0f} records a CPU second" if rates else ""
            print(f"  {peer}: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}){rate}", flush=True)
    memory = [run["prepare"]["megabytes_after_each_tar"] for run in runs]
    print(f"prepare: MB after the second tar and after the last: {[(round(one[1]), round(one[-1])) for one in memory]}")
    with tempfile.TemporaryDirectory() as scratch:
        resumed = [resumes(Path(scratch)) for _ in range(arguments.runs)]
    for row in resumed[0]:
        seconds, megabytes = ([one[row][key] for one in resumed] for key in ("seconds", "megabytes"))
        print(f"resume at row {row}: up to {max(seconds):.3f} s, {min(megabytes):.0f} to {max(megabytes):.0f} MB")
    if arguments.json:
        arguments.json.write_text(json.dumps({"cases": found, "resume": resumed}, indent=1))


if __name__ == "__main__":
    main()
