"""Prepares a config's data: `python -m ecdit.prepare --config=configs/emoji.py`. Does nothing if it is prepared."""

from ecdit.command_line import config_values, define_config_flag, run_command
from ecdit.data.records import dataset_directory, prepare
from ecdit.experiment import make_experiment

CONFIG = define_config_flag()


def main(argv: list[str]) -> None:
    """Prepares, and says where the data is."""
    del argv
    experiment = make_experiment(config_values(CONFIG))
    manifest = prepare(experiment.data)
    print(f"{manifest.num_records} records in {dataset_directory(experiment.data)}")


if __name__ == "__main__":
    run_command(main)
