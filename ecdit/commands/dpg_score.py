"""`dpg-score --items=F.jsonl` scores a judge's answers by DPG-Bench's rules, corrected."""

from pathlib import Path

from absl import flags

from ecdit.commands.dsg_score import print_overall
from ecdit.evaluation.dpg import score, summarize
from ecdit.evaluation.questions import read_items
from ecdit.json_lines import at_line, json_text, result_paths, write_results


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags of this evaluation."""
    lines = 'Lines {"item_id", "questions": [{"id", "dependency", "tuple", "answers": [one for each image]}, ...]}.'
    flags.DEFINE_string("items", None, lines, required=True, flag_values=values)
    flags.DEFINE_string("json", None, "File for the result.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Scores, prints and writes the result."""
    path = Path(values.items)
    (out,) = result_paths(values, "json", inputs=["items"])
    items, scores = [], {}
    for number, item in read_items(path, "answers", with_tuple=True):
        with at_line(path, number):
            scores[item.item_id] = score(item)
        items.append(item)
    result = summarize(items, scores)
    for name, found in result["l1"].items():
        print(f"{name:<16} {found:.2f}")
    images = sorted({len(item.questions[0].answers) for item in items})
    print(f"images per item: {', '.join(map(str, images))}")
    print_overall(result)
    if out:
        write_results(out, json_text(result))
