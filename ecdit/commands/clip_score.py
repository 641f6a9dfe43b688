"""`clip-score --images=DIR --clip=FOLDER` scores images against their captions by any CLIP."""

import json
from pathlib import Path

from absl import flags

from ecdit.errors import UserError
from ecdit.evaluation.clip_score import clip_scores, read_clip
from ecdit.json_lines import at_line, json_text, read_lines, require, result_paths, take, write_results
from ecdit.pretrained.weights import fingerprint


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags of this evaluation."""
    images = "A directory of ecdit.sample, whose manifest.json has the captions; or any, with --items."
    flags.DEFINE_string("images", None, images, required=True, flag_values=values)
    lines = 'Lines {"file", "caption"}, files under --images, in place of its manifest.'
    flags.DEFINE_string("items", None, lines, flag_values=values)
    clip = "A CLIP's folder as transformers writes it: config.json, safetensors, and the tokenizer's files."
    flags.DEFINE_string("clip", None, clip, required=True, flag_values=values)
    flags.DEFINE_integer("batch_size", 32, "Images at a time.", 1, flag_values=values)
    flags.DEFINE_string("json", None, "File for the result.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Scores, prints and writes the result."""
    (out,) = result_paths(values, "json", inputs=["items"])
    pairs = captioned(Path(values.images), Path(values.items) if values.items else None)
    folder = Path(values.clip)
    result = clip_scores(read_clip(folder), pairs, values.batch_size)
    result |= {"clip": values.clip, "clip_sha256": fingerprint(folder)}
    print(
        f"{result['images']} images: mean cosine {result['cosine']:.4f}, torchmetrics' form "
        f"{result['torchmetrics']:.2f}, Hessel's form {result['hessel']:.4f}; {values.clip}"
    )
    if out:
        write_results(out, json_text(result))


def captioned(folder: Path, items: Path | None) -> list[tuple[Path, str]]:
    """Returns the images of a folder with their captions.

    Raises:
      UserError: there is no manifest, or none of a folder that is finished; a line without file or caption, or whose
        file is missing.
    """
    if items is not None:
        found = []
        for number, line in read_lines(items):
            with at_line(items, number):
                found.append((folder / take(line, "file", str), take(line, "caption", str)))
                require(found[-1][0].is_file(), "file", line["file"], f"must be an image under --images={folder}")
        return found
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        rows = [(folder / row["file"], row["prompt"]) for row in manifest["images"]]
        finished = manifest["finished"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"--images={folder}: has no manifest.json of ecdit.sample; give --items ({error})") from None
    if not finished:
        raise UserError(f"--images={folder}: is not finished; run the same ecdit.sample again")
    return rows
