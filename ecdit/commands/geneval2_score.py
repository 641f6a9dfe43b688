"""`geneval2-score --benchmark=geneval2_data.jsonl --answers=F.jsonl` computes GenEval 2's Soft-TIFA scores."""

from pathlib import Path

from absl import flags

from ecdit.evaluation.geneval2 import read_answers, read_benchmark, summarize
from ecdit.json_lines import json_text, result_paths, write_results


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags of this evaluation."""
    flags.DEFINE_string("benchmark", None, "geneval2_data.jsonl of GenEval 2.", required=True, flag_values=values)
    lines = 'Lines {"prompt", "scores": [one for each question]} in any order.'
    flags.DEFINE_string("answers", None, lines, required=True, flag_values=values)
    flags.DEFINE_string("json", None, "File for the result.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Scores, prints and writes the result."""
    (out,) = result_paths(values, "json", inputs=["benchmark", "answers"])
    benchmark = read_benchmark(Path(values.benchmark))
    result = summarize(benchmark, read_answers(Path(values.answers), benchmark))
    skills = ", ".join(f"{skill} {found:.2f}" for skill, found in result["skills"].items())
    print(f"Soft-TIFA AM {result['am']:.2f}, GM {result['gm']:.2f}, {len(benchmark)} prompts; AM by skill: {skills}")
    if out:
        write_results(out, json_text(result))
