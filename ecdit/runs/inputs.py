"""Says what a run learns from, before anything else: its data, and the weights that it begins with."""

from collections.abc import Sequence

from ecdit.config import require
from ecdit.data.config import DataConfig
from ecdit.data.generated import GENERATED
from ecdit.data.manifest import task_directory
from ecdit.experiment import Experiment

_PLACEHOLDER = "PLACEHOLDER, random numbers in place of latents"


def inputs_line(experiment: Experiment) -> str:
    """Returns the first line of a run, a plan and a launch: which data and which weights."""
    told = [(phase.after, _describe_data(phase.experiment.data)) for phase in experiment.resolved_phases()]
    changed = [(after, text) for n, (after, text) in enumerate(told) if n == 0 or text != told[n - 1][1]]
    data = ", ".join(text if after == 0 else f"from step {after + 1} {text}" for after, text in changed)
    return f"data: {data}; weights at step 0: {describe_weights(experiment)}"


def describe_weights(experiment: Experiment) -> str:
    """Returns where the weights of a run without checkpoints are from."""
    source, text = experiment.checkpoint.init_from, experiment.text
    if text.public:
        told = f"text encoder of {' and '.join(map(str, text.folders))}"
    elif source:
        told = f"text tower of {source} ({'frozen' if text.frozen else 'trained'})"
    else:
        told = f"random text tower ({'frozen, never trained' if text.frozen else 'trained'})"
    told += f", autoencoder of {experiment.vae.weights}" if experiment.autoencoder == "vae" else ""
    return f"{told}, {f'denoiser of {source} (EMA)' if source else 'random denoiser'}"


def check_placeholder(config: DataConfig, tasks: Sequence[str], hosts: int) -> None:
    """Raises ConfigError where several hosts would train on random numbers and nobody has said that this is meant.

    Args:
      config: of the data.
      tasks: that it reads: its own, or the parts of a mixture.
      hosts: how many processes train.
    """
    random = [task for task in tasks if _is_placeholder(config, task)]
    require(
        not random or hosts == 1 or config.placeholder_ok,
        "data.placeholder_ok",
        config.placeholder_ok,
        f"must be True: {hosts} hosts would train on {', '.join(random)}, random numbers in place of data. "
        "Name your own in data.task (docs/data.md)",
    )


def _is_placeholder(config: DataConfig, task: str) -> bool:
    users_own = task == config.task and config.module  # a file of theirs may register that name
    return task in GENERATED and GENERATED[task].placeholder and not users_own


def _describe_data(config: DataConfig) -> str:
    where = f"{config.task} in {task_directory(config)}"
    return f"{config.task} ({_PLACEHOLDER})" if _is_placeholder(config, config.task) else where
