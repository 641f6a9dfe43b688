"""Evaluates the EMA weights of a run while it trains, as the config's group `evaluation` says."""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ecdit.data.prepared import open_prepared, prompt_tokens
from ecdit.evaluation.config import EvaluationConfig
from ecdit.evaluation.flow_loss import BINS, fixed_rows, losses_by_time, make_loss_program
from ecdit.evaluation.retrieval import protocol
from ecdit.evaluation.run_scores import load_retrieval, score_retrieval, score_shapes, shapes_of
from ecdit.experiment import Experiment
from ecdit.files import replace_text, writing
from ecdit.multihost import from_first, on_first, together
from ecdit.sampling.grids import save_grid
from ecdit.sampling.prompts import check_prompts, prompt_lines
from ecdit.sampling.sampler import make_sampler, sample_images, warn
from ecdit.storage import children, make_directory, reading
from ecdit.system import Params, image_groups, make_system

EVALUATIONS = "evaluations"  # of a workdir


def host_facts(config: EvaluationConfig) -> dict[str, str]:
    """Returns what all hosts of a run must have in common for its evaluations: the prompts, which each reads itself."""
    if not (config.every and config.prompts):
        return {}
    try:
        found = hashlib.sha256(Path(config.prompts).read_bytes()).hexdigest()[:12]
    except OSError as error:
        found = f"no file that can be read: {error.strerror}"
    return {f"evaluation.prompts={config.prompts}": found}


class Evaluated(NamedTuple):
    """The evaluation of a step."""

    scalars: dict[str, float]  # by name, such as eval/loss
    files: dict[str, Path]  # images by name


class Evaluator:
    """Evaluates a step of a run. Reads what it needs once, and compiles each part once."""

    def __init__(
        self,
        experiment: Experiment,
        mesh: Mesh,
        workdir: Path,
        read_prompts: Callable[[str, str], list[str]] = prompt_lines,
    ):
        """Raises UserError (its subclasses) where the config's evaluation does not fit the run."""
        config, data = experiment.evaluation, experiment.data
        system = make_system(experiment.system)
        self.config, self.data, self.sampling, self.workdir = config, data, experiment.sampling, workdir
        self.tokenize = prompt_tokens(data)
        self.rows, self.prompts = None, list[str]()
        if config.loss_images:
            self.rows = fixed_rows(open_prepared(data), config.loss_images, config.split)
            self.loss_program = make_loss_program(system, mesh, experiment.sampling.batch_size)
        if config.prompts:
            self.prompts = read_prompts(config.prompts, "evaluation.prompts")
            for problem in check_prompts(self.tokenize, self.prompts):
                warn(f"evaluation.prompts={config.prompts}: {problem}")
            self.prompt_sampler = make_sampler(system, self.sampling, mesh, not_finite=warn)
        if config.score != "none":
            # What is missing is said before the first step, and not at the first evaluation.
            if config.score == "shapes":
                shapes_of(data)
                self.score = functools.partial(score_shapes, data, config.captions, config.split)
            else:
                loaded = load_retrieval(data, config.captions, config.split)
                self.score = functools.partial(score_retrieval, loaded)
            self.protocol = protocol(experiment.sampling)
            self.score_sampler = make_sampler(image_groups(system), self.protocol, mesh, not_finite=warn)

    def is_recorded(self, step: int) -> bool:
        """Returns whether the step was evaluated by an earlier start. The first process says it for all."""

        def look() -> bool:
            with reading(self.workdir):
                return jax.process_index() == 0 and _record(self.workdir, step).exists()

        return bool(from_first(np.array(together(look))))

    def evaluate(self, params: Params, step: int, permit: Callable[[], None] = lambda: None) -> Evaluated:
        """Evaluates weights, calls `permit`, and writes evaluations/step_XXXXXXXX.json and the images. Collective.

        Raises:
          UserError: a file cannot be written; or another error that `permit` raises.
        """
        found: dict[str, Any] = {}
        if self.rows is not None:
            by_time = losses_by_time(self.loss_program, params, self.rows)
            found["loss"] = {"mean": float(by_time.mean()), "by_time": by_time.tolist()}
        if self.config.score != "none":
            found[self.config.score] = self.score(functools.partial(self._draw, params))
        images = self._draw_prompts(params)
        files = {} if images is None else {"prompts": self.workdir / EVALUATIONS / f"step_{step:08d}.png"}

        def write() -> None:
            permit()
            with writing(self.workdir / EVALUATIONS):
                make_directory(self.workdir / EVALUATIONS)
                if images is not None:
                    save_grid(images, self.prompts, files["prompts"])
            # Last: a step with a record has been evaluated whole.
            replace_text(_record(self.workdir, step), json.dumps({"step": step, **found}, indent=2) + "\n")

        on_first(write)
        return Evaluated(scalars(found), files)

    def _draw(self, params: Params, captions: Sequence[str]) -> np.ndarray:
        """Draws by the score's protocol."""
        repeats = [0] * len(captions)
        return sample_images(self.score_sampler, params, self.tokenize, captions, repeats, self.protocol)

    def _draw_prompts(self, params: Params) -> np.ndarray | None:
        """Draws the user's prompts as the config's sampling says; None if there are none."""
        if not self.prompts:
            return None
        repeats = [0] * len(self.prompts)
        return sample_images(self.prompt_sampler, params, self.tokenize, self.prompts, repeats, self.sampling)


def drop_later(workdir: Path, step: int) -> None:
    """Deletes evaluations of steps after the one that a run goes on from, which other weights may reach now."""
    for path in children(workdir / EVALUATIONS):
        number = path.stem.removeprefix("step_")
        if number.isdigit() and int(number) > step:
            path.unlink(missing_ok=True)


def scalars(found: dict[str, Any]) -> dict[str, float]:
    """Returns an evaluation's numbers by name, those of the loss by the middle of their bin of time."""
    named = {}
    if loss := found.get("loss"):
        named["eval/loss"] = loss["mean"]
        named |= {f"eval/loss/t_{(i + 0.5) / BINS:.2f}": value for i, value in enumerate(loss["by_time"])}
    for name in ("shapes", "retrieval"):
        for key, value in found.get(name, {}).items():
            several = value if isinstance(value, dict) else {key: value}
            named |= {f"eval/{name}/{one}": number for one, number in several.items()}
    return named


def _record(workdir: Path, step: int) -> Path:
    return workdir / EVALUATIONS / f"step_{step:08d}.json"
