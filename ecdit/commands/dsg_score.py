"""`dsg-score --items=F.jsonl` scores a judge's answers by DSG's rules."""

from pathlib import Path

from absl import flags

from ecdit.evaluation.dsg import share, summarize
from ecdit.evaluation.questions import read_items
from ecdit.json_lines import json_text, result_paths, write_results


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags of this evaluation."""
    lines = 'Lines {"item_id", "questions": [{"id", "dependency", "answer"}, ...]}.'
    flags.DEFINE_string("items", None, lines, required=True, flag_values=values)
    flags.DEFINE_string("json", None, "File for the result.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Scores, prints and writes the result."""
    (out,) = result_paths(values, "json", inputs=["items"])
    items = [item for _, item in read_items(Path(values.items), "answer", with_tuple=False)]
    result = summarize({item.item_id: share(item) for item in items})
    malformed = [item.item_id for item in items if any(question.parents is None for question in item.questions)]
    if malformed:
        print(f"{len(malformed)} items have a malformed dependency, so their dependencies are ignored: {malformed[:5]}")
    print_overall(result)
    if out:
        write_results(out, json_text(result))


def print_overall(result: dict) -> None:
    """Prints the mean and the items that it leaves out."""
    left_out = [item_id for item_id, found in result["items"].items() if found is None]
    if left_out:
        print(f"{len(left_out)} items depend on a question that does not exist, and do not count: {left_out[:5]}")
    overall = "no item counts" if result["overall"] is None else f"overall {result['overall']:.5g}"
    print(f"{overall}, {len(result['items']) - len(left_out)} items")
