"""`geneval-score --detections=F.jsonl --out=R.jsonl` judges images by GenEval's rules."""

import dataclasses
import json
from pathlib import Path

from absl import flags

from ecdit.evaluation.geneval import TASKS, summarize
from ecdit.evaluation.geneval_lines import judge_lines
from ecdit.json_lines import json_text, result_paths, write_results


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags of this evaluation."""
    lines = 'Lines {"filename", "metadata", "detections", "colors"}.'
    flags.DEFINE_string("detections", None, lines, required=True, flag_values=values)
    lines = 'File for the lines {"filename", "tag", "prompt", "correct", "reason"}.'
    flags.DEFINE_string("out", None, lines, required=True, flag_values=values)
    flags.DEFINE_string("json", None, "File for the shares of the tasks.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Scores, writes both files and prints the summary."""
    out, summary_file = result_paths(values, "out", "json", inputs=["detections"])
    assert out is not None, "--out is required"
    verdicts = judge_lines(Path(values.detections))
    summary = summarize(verdicts)
    write_results(out, "".join(json.dumps(dataclasses.asdict(verdict)) + "\n" for verdict in verdicts))
    if summary_file:
        write_results(summary_file, json_text(summary))
    for tag, share in summary["tasks"].items():
        print(f"{tag:<16} {share:.2%}")
    missing = [task for task in TASKS if task not in summary["tasks"]]
    note = f"; not all of GenEval: there are no images of {', '.join(missing)}" if missing else ""
    print(f"overall {summary['overall']:.5f}, the mean of {len(summary['tasks'])} tasks, {len(verdicts)} images{note}")
