"""`paper --workdir=runs/M` computes what data and weights at hand allow, and prints it beside the paper's numbers.

The paper is arXiv 2410.02098. Its numbers stand in `PAPER` with where we have them from: "abstract", or "notes" of it
by a third party. What other programs must judge (detectors, question answerers) is read from the results of
`ecdit.evaluate` in --results, by the names in `READ`; what is missing is named with the commands that make it.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from ecdit.commands.loss import loss
from ecdit.commands.retrieval import retrieval
from ecdit.commands.shapes import shapes
from ecdit.data.generated import GENERATED, Shapes
from ecdit.errors import UserError
from ecdit.evaluation.clip_score import clip_scores, read_clip
from ecdit.evaluation.geneval import TASKS
from ecdit.files import is_remote
from ecdit.json_lines import json_text, result_paths, write_results
from ecdit.pretrained.inception import FEATURES
from ecdit.runs.kept_tokenizer import open_tokenizer
from ecdit.runs.sample_folder import describe_source, draw_folder
from ecdit.runs.trained_run import open_run, saved_experiment
from ecdit.sampling.layouts import plan_images
from ecdit.sampling.prompt_files import choose, read_prompt_file
from ecdit.sampling.prompts import check_prompts
from ecdit.storage import as_path

# Of the largest model, M-64E: the number, and where we have it from.
PAPER: Mapping[str, tuple[float, str]] = {
    "GenEval, overall, %": (71.68, "abstract"),
    "GenEval, two objects, %": (88.67, "notes"),
    "GenEval, colour attribution, %": (60.80, "notes"),
    "GenEval, position, %": (21.33, "notes"),
    "DSG, %": (76.40, "abstract"),
}
_SAMPLE = "python -m ecdit.sample --workdir=W --prompts="
_SCORE = "python -m ecdit.evaluate "


@dataclasses.dataclass(frozen=True)
class Read:
    """A number that is read from the result of an evaluation."""

    name: str
    file: str  # of --results
    value: Callable[[Mapping[str, Any]], float | None]  # None where the result has none, such as a task without images
    how: str  # to make the file
    note: Callable[[Mapping[str, Any]], str] = lambda found: ""  # why numbers do not compare
    in_paper: bool = True


def _share(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda found: found["tasks"].get(name)


def _missing_tasks(found: Mapping[str, Any]) -> str:
    missing = [task for task in TASKS if task not in found["tasks"]]
    return f"does not compare: there are no images of {', '.join(missing)}" if missing else ""


def _fid_note(found: Mapping[str, Any]) -> str:
    extractors = [found["extractor"], found.get("reference_extractor", found["extractor"])]
    alike = "the paper's number, crop and implementation are not known to us"
    if found.get("dimensions", FEATURES) != FEATURES or len(set(extractors)) > 1 or None in extractors:
        alike = f"is no FID: {found.get('dimensions')} dimensions, of {' and '.join(map(str, extractors))}"
    return f"{found['samples'] or 'unknown'} samples, {found['extractor']}; {alike}"


READ = (
    *(
        Read(
            name,
            "geneval.json",
            value,
            f"{_SAMPLE}evaluation_metadata.jsonl, {_SCORE}geneval, {_SCORE}geneval-score --json=geneval.json",
            note,
        )
        for name, value, note in (
            ("GenEval, overall, %", lambda found: found["overall"], _missing_tasks),
            ("GenEval, two objects, %", _share("two_object"), lambda found: ""),
            ("GenEval, colour attribution, %", _share("color_attr"), lambda found: ""),
            ("GenEval, position, %", _share("position"), lambda found: ""),
        )
    ),
    Read(
        "DSG, %",
        "dsg.json",
        lambda found: found["overall"],
        f"images of DSG's prompts, a judge's answers, {_SCORE}dsg-score --json=dsg.json",
        lambda found: "the paper's judge is not public: compare runs of one judge alone",
    ),
    Read(
        "FID, COCO-30K",
        "fid.json",
        lambda found: found["frechet"],
        f"{_SAMPLE}captions_val2014.json --num_prompts=30000, {_SCORE}frechet --images=... --json=fid.json",
        _fid_note,
    ),
    Read(
        "GenEval 2, Soft-TIFA AM",
        "geneval2.json",
        lambda found: found["am"],
        f"{_SAMPLE}geneval2_data.jsonl, a judge's answers, {_SCORE}geneval2-score --json=geneval2.json",
        lambda found: "later than the paper",
        in_paper=False,
    ),
    Read(
        "DPG-Bench",
        "dpg.json",
        lambda found: found["overall"],
        f"{_SAMPLE}DPG's prompts, a judge's answers, {_SCORE}dpg-score --json=dpg.json",
        lambda found: "not in the paper",
        in_paper=False,
    ),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    paper: str
    ours: float | None
    missing: str  # what it takes to have ours, or what to know of it


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags of this evaluation."""
    flags.DEFINE_string("workdir", None, "The run.", required=True, flag_values=values)
    flags.DEFINE_string(
        "results", None, "Directory of other evaluations' JSON; by default W/paper.", flag_values=values
    )
    flags.DEFINE_string("coco", None, "captions_val2014.json, to draw images of it.", flag_values=values)
    flags.DEFINE_string("clip", None, "A CLIP's folder, to score those images.", flag_values=values)
    flags.DEFINE_integer("num_images", 30_000, "Of COCO.", 1, flag_values=values)
    flags.DEFINE_integer("captions", 50, "Captions of a score on the run's own data.", 1, flag_values=values)
    flags.DEFINE_string("json", None, "File for the table.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Evaluates, prints the table and writes it."""
    (out,) = result_paths(values, "json")
    workdir = as_path(values.workdir)
    results = Path(values.results) if values.results else workdir / "paper"
    if is_remote(results):
        raise UserError(f"--results={results}: must be a directory of this machine")
    rows = [*read_results(results), coco(workdir, results, values.coco, values.clip, values.num_images)]
    rows += own(workdir, values.captions)
    print(table(rows))
    if out:
        write_results(out, json_text({"rows": [dataclasses.asdict(row) for row in rows]}))


def read_results(folder: Path) -> list[Row]:
    """Returns the rows of evaluations that were made before.

    Raises:
      UserError: a file is there and is no such result.
    """
    rows = []
    for one in READ:
        number, source = PAPER.get(one.name, (None, ""))
        unknown = "not known" if one.in_paper else "none"
        paper = unknown if number is None else f"{number:.2f} ({source})"
        file, ours, missing = folder / one.file, None, f"{one.how} in {folder}"
        if file.exists():
            try:
                found = json.loads(file.read_text())
                ours, written = one.value(found), time.strftime("%Y-%m-%d", time.localtime(file.stat().st_mtime))
                missing = "; ".join(filter(None, [one.note(found), f"{file} of {written}"]))
                if ours is None:
                    missing = f"{file} has none"
                else:
                    ours = _finite(100 * ours if one.name.endswith("%") else ours)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise UserError(f"{file}: is no result for {one.name}: {type(error).__name__}: {error}") from None
        rows.append(Row(one.name, paper, ours, missing))
    return rows


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError(f"{number}: must be finite")
    return float(number)


def coco(workdir: Path, results: Path, captions: str | None, clip: str | None, count: int) -> Row:
    """Draws images of COCO captions into `results`, or goes on with them, and scores them by CLIP."""
    name, paper = "CLIP score, COCO (torchmetrics' form)", "not known"
    absent = [
        flag for flag, value in (("--coco=captions_val2014.json", captions), ("--clip=FOLDER", clip)) if not value
    ]
    if not captions or not clip:
        return Row(name, paper, None, f"give {' and '.join(absent)}; the paper's CLIP is ViT-bigG")
    _, prompts = read_prompt_file(Path(captions), "coco")
    planned = plan_images("coco", choose(prompts, min(count, len(prompts))), 1)
    scorer = read_clip(Path(clip))  # first: to draw takes hours
    run = open_run(workdir)
    out = results / f"coco_{run.step:08d}_{len(planned)}"
    source = {"workdir": str(workdir)} | describe_source(run, [], "coco")
    try:
        warnings = check_prompts(open_tokenizer(workdir, run.experiment.data), [one.prompt for one in planned])
        for warning in warnings:
            print(f"warning: {warning}", flush=True)
        draw_folder(run, out, planned, source)
    except UserError as error:
        return Row(name, paper, None, f"{out}: {error}")
    found = clip_scores(scorer, [(out / one.file, one.prompt) for one in planned], 32)
    return Row(name, paper, found["torchmetrics"], f"{found['images']} images by {clip}; the paper's CLIP is ViT-bigG")


def own(workdir: Path, captions: int) -> list[Row]:
    """Returns the scores that the run's own data has; the paper has none of them."""
    rows, data = [], saved_experiment(workdir).data
    try:
        mean = loss(workdir, None, 256, "held_out", 64)["losses"][0]["mean"]
        rows.append(Row("flow loss, held out, EMA", "none", mean, "of this data alone"))
    except UserError as error:
        rows.append(Row("flow loss, held out, EMA", "none", None, str(error)))
    if isinstance(GENERATED.get(data.task), Shapes):
        try:
            result = shapes(workdir, None, captions, "train", 0)
            ours = 100 * result["overall"]
            rows.append(Row("shapes, overall, %", "none", ours, "in GenEval's kinds, by an exact judge"))
        except UserError as error:
            rows.append(Row("shapes, overall, %", "none", None, str(error)))
    else:
        try:
            found = retrieval(workdir, None, captions)
            note = f"fit to the training captions, {found['num_captions']} of them"
            rows.append(Row("retrieval, R@1, %", "none", 100 * found["r_at_1"], note))
        except UserError as error:
            rows.append(Row("retrieval, R@1, %", "none", None, str(error)))
    return rows


def table(rows: list[Row]) -> str:
    """Returns the rows as a table in Markdown."""
    lines = ["| | paper, M-64E | ours | missing, or to know |", "|---|---|---|---|"]
    for row in rows:
        ours = "-" if row.ours is None else f"{row.ours:.4g}"
        lines.append(f"| {row.name} | {row.paper} | {ours} | {row.missing} |")
    return "\n".join(lines)
