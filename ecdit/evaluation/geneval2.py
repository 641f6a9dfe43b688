"""GenEval 2: Soft-TIFA scores from a judge's probabilities of the right answers, from 0 to 100.

GenEval 2 (arXiv 2512.16853). The rules are those of evaluation.py and soft_tifa_analysis.py of
github.com/facebookresearch/GenEval2 at commit a6e82d2. A score is the probability that a question's answer is right,
summed over the spellings of the answer. It can exceed 1, as spellings can begin with the same token, and is not
clipped; but more than 6, one for each spelling, is a mistake such as percents. Differences on purpose:
- Answers are joined with questions by the prompt; the original's are a list in the order of the benchmark.
- A skill or an atom count without prompts is left out; the original divides by zero.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ecdit.errors import UserError
from ecdit.json_lines import at_line, is_number, read_lines, require, shown, take

SKILLS = ("object", "attribute", "count", "position", "verb")
MAX_SCORE = 6  # probabilities of this many spellings of an answer are summed at most


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt of the benchmark: how many atoms it has, and the skill that each of its questions asks about."""

    text: str
    atom_count: int
    skills: tuple[str, ...]


def read_benchmark(path: Path) -> list[Prompt]:
    """Returns the prompts of geneval2_data.jsonl: lines {"prompt", "atom_count", "vqa_list", "skills"}.

    Raises:
      UserError: a line is unreadable, lacks a key or has a value that is not allowed; or a prompt stands twice.
    """
    prompts: dict[str, Prompt] = {}
    for number, values in read_lines(path):
        with at_line(path, number):
            text, count = take(values, "prompt", str), take(values, "atom_count", int)
            skills, questions = take(values, "skills", list), take(values, "vqa_list", list)
            require(text not in prompts, "prompt", text, "stands twice")
            require(count >= 1, "atom_count", count, "must be 1 or more")
            require(bool(skills), "skills", skills, "must have one or more")
            require(len(skills) == len(questions), "skills", skills, f"must have {len(questions)}, as vqa_list has")
            for i, skill in enumerate(skills):
                require(skill in SKILLS, f"skills[{i}]", skill, f"must be one of {', '.join(SKILLS)}")
        prompts[text] = Prompt(text, count, tuple(skills))
    return list(prompts.values())


def read_answers(path: Path, benchmark: Sequence[Prompt]) -> dict[str, list[float]]:
    """Returns the scores of each prompt: lines {"prompt", "scores"} in any order.

    Raises:
      UserError: a line is unreadable, lacks a key or has a value that is not allowed; a prompt is not the benchmark's,
        stands twice or is missing; or has another number of scores than the benchmark has questions.
    """
    known, answers = {prompt.text: prompt for prompt in benchmark}, {}
    for number, values in read_lines(path):
        with at_line(path, number):
            text, scores = take(values, "prompt", str), take(values, "scores", list)
            version = "is the benchmark another version?"
            require(text in known, "prompt", text, f"is none of the benchmark's {len(known)} prompts; {version}")
            require(text not in answers, "prompt", text, "stands twice")
            asked = len(known[text].skills)
            require(len(scores) == asked, "scores", scores, f"must be {asked}, one for each question; {version}")
            for i, score in enumerate(scores):
                allowed = f"must be a number from 0 to {MAX_SCORE}, a sum of probabilities"
                require(is_number(score) and 0 <= score <= MAX_SCORE, f"scores[{i}]", score, allowed)
        answers[text] = [float(score) for score in scores]
    missing = [prompt.text for prompt in benchmark if prompt.text not in answers]
    if missing:
        raise UserError(f"{path}: {len(missing)} of {len(known)} prompts have no scores; first {shown(missing[0])}")
    return answers


def geometric_mean(scores: Sequence[float]) -> float:
    """Returns the geometric mean, by logarithms in float64: the product of ten scores of 1e-34 would underflow to 0."""
    if min(scores) == 0:
        return 0.0
    return float(np.exp(np.mean(np.log(np.asarray(scores, np.float64)))))


def summarize(benchmark: Sequence[Prompt], answers: Mapping[str, Sequence[float]]) -> dict:
    """Returns `am` and `gm`, `skills` and `atomicity`, from 0 to 100.

    `am` and `gm` are means over prompts of the arithmetic and the geometric mean of a prompt's scores. `skills` has the
    mean over all questions of a skill, and `atomicity` the mean of the geometric means by atom count.
    """
    skills: dict[str, list[float]] = {skill: [] for skill in SKILLS}
    atomicity: dict[int, list[float]] = {}
    geometric = {prompt.text: geometric_mean(answers[prompt.text]) for prompt in benchmark}
    for prompt in benchmark:
        for skill, score in zip(prompt.skills, answers[prompt.text], strict=True):
            skills[skill].append(score)
        atomicity.setdefault(prompt.atom_count, []).append(geometric[prompt.text])
    return {
        "am": 100 * float(np.mean([np.mean(answers[prompt.text]) for prompt in benchmark])),
        "gm": 100 * float(np.mean(list(geometric.values()))),
        "skills": {skill: 100 * float(np.mean(scores)) for skill, scores in skills.items() if scores},
        "atomicity": {str(count): 100 * float(np.mean(means)) for count, means in sorted(atomicity.items())},
    }
