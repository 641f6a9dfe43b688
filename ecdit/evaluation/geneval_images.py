"""Makes the lines that GenEval's scorer reads, from a folder with 00000/samples/0000.png and 00000/metadata.jsonl."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32
from PIL import Image

from ecdit.errors import UserError
from ecdit.evaluation.geneval import CLASSES, confident
from ecdit.evaluation.geneval_detector import Instances
from ecdit.evaluation.geneval_lines import image_of
from ecdit.evaluation.image_files import check_finished, read_upright
from ecdit.files import writing
from ecdit.json_lines import at_line, read_lines, write_results

# (image, boxes, their masks, the class's name) -> a colour for each box
Classifier = Callable[
    [Image.Image, Float32[np.ndarray, "n 5"], Sequence[Bool[np.ndarray, "h w"]], str], Sequence[str | None]
]


@dataclasses.dataclass(frozen=True)
class Sample:
    """An image that is to be looked at."""

    filename: str  # under the folder
    path: Path
    metadata: dict[str, Any]

    @property
    def coloured(self) -> list[str]:
        """Returns the classes whose colours the prompt asks for."""
        return sorted({clause["class"] for clause in self.metadata["include"] if "color" in clause})


def samples(folder: Path) -> list[Sample]:
    """Returns the images of a folder in GenEval's layout, which `ecdit.sample --format=geneval` writes.

    Raises:
      UserError: there are none, a prompt has none, or its metadata is no line of GenEval's.
    """
    if not folder.is_dir():
        raise UserError(f"--images={folder}: is no directory")
    check_finished(folder, "--images")
    found = []
    for prompt in sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()):
        metadata = _metadata(prompt / "metadata.jsonl")
        images = sorted(path for path in (prompt / "samples").glob("*.png") if re.match(r"\d+\.png$", path.name))
        if not images:
            raise UserError(f"--images={folder}: {prompt / 'samples'} has no images such as 0000.png")
        found += [Sample(path.relative_to(folder).as_posix(), path, metadata) for path in images]
    if not found:
        raise UserError(f"--images={folder}: has no folders such as 00000/ with metadata.jsonl and samples/0000.png")
    return found


def state_of(folder: Path, wanted: Sequence[Sample]) -> dict[str, str | None]:
    """Returns hashes of what changes when the images of a folder are drawn again, for `look`.

    They are of the images' places, prompts, sizes and times, and of the manifest with which ecdit.sample says what the
    images are of; None without one.
    """
    digest, manifest = hashlib.sha256(), folder / "manifest.json"
    for sample in wanted:
        found = sample.path.stat()
        said = (str(sample.path.absolute()), sample.metadata, found.st_size, found.st_mtime_ns)
        digest.update(json.dumps(said).encode())
    said = hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None
    return {"images": digest.hexdigest(), "manifest": said}


def _metadata(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: is missing; it must hold the prompt's line of evaluation_metadata.jsonl")
    lines = list(read_lines(path))
    with at_line(path, lines[0][0]):
        image_of({"filename": "", "metadata": lines[0][1], "detections": {}})
    if len(lines) > 1:
        raise UserError(f"{path}: has {len(lines)} lines; it must have one")
    return lines[0][1]


def line_of(sample: Sample, image: Image.Image, found: Instances, classify: Classifier | None) -> dict[str, Any]:
    """Returns the scorer's line of an image.

    Colours are those of the boxes that can count, by the scorer's own rule; the others have null.

    Raises:
      UserError: a network's numbers are not finite.
    """
    if not np.isfinite(found.boxes).all():
        raise UserError("a score or box by --detector is not finite; its weights may be damaged")
    detections, colours = {}, {}
    for place in np.unique(found.classes).tolist():
        of_class = np.flatnonzero(found.classes == place)
        boxes, name = found.boxes[of_class], CLASSES[place]
        detections[name] = boxes.astype(np.float64).tolist()
        if name not in sample.coloured:
            continue
        colours[name] = [None] * len(boxes)
        counted = confident(boxes[:, 4], sample.metadata["tag"])
        if len(counted):
            assert classify is not None, "colours are asked for"
            masks = [found.masks[query] for query in found.queries[of_class][counted].tolist()]
            for box, colour in zip(counted.tolist(), classify(image, boxes[counted], masks, name), strict=True):
                colours[name][box] = colour
    return {"filename": sample.filename, "metadata": sample.metadata, "detections": detections, "colors": colours}


def look(
    wanted: Sequence[Sample],
    detect: Callable[[np.ndarray], Instances],
    classify: Classifier | None,
    made_by: dict[str, Any],
    out: Path,
) -> Iterator[str]:
    """Writes the lines of all images to `out`, and yields the name of each image that is done.

    Lines go to `out` with the ending .part, one by one, until all are there. Called again after an interruption, it
    looks only at the rest.

    Args:
      wanted: the images.
      detect: the detector.
      classify: the colours' classifier; None if no prompt asks for a colour.
      made_by: what decides the lines: a .part file of something else is refused.
      out: the file.

    Raises:
      UserError: an image cannot be read, a network's numbers on it are not finite, or the .part file is another
        detector's. Lines that are done are kept.
    """
    part = out.with_name(f"{out.name}.part")
    done = _resumed(part, made_by)
    with writing(part), part.open("a", encoding="utf-8") as file:
        for sample in wanted:
            if sample.filename not in done:
                image = read_upright(sample.path)
                try:
                    line = line_of(sample, image, detect(np.asarray(image)), classify)
                except UserError as error:
                    raise UserError(f"{sample.path}: {error}") from error
                done[sample.filename] = json.dumps(line, allow_nan=False)
                file.write(done[sample.filename] + "\n")
                file.flush()
            yield sample.filename
    write_results(out, "".join(done[sample.filename] + "\n" for sample in wanted))
    part.unlink()


def _resumed(part: Path, made_by: dict[str, Any]) -> dict[str, str]:
    """Returns the whole lines of an earlier call by file name, after making the file one that can be appended to."""
    header = json.dumps({"made_by": made_by})
    lines = part.read_text(encoding="utf-8").split("\n")[:-1] if part.exists() else []  # the last one is not whole
    if lines and lines[0] != header:
        raise UserError(f"{part}: is of another detector or CLIP, or of other images; remove it to begin again")
    try:
        found = {json.loads(line)["filename"]: line for line in lines[1:]}
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{part}: is damaged ({error}); remove it to begin again") from None
    write_results(part, "".join(f"{line}\n" for line in [header, *found.values()]))
    return found
