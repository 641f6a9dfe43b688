"""The emoji config in three phases: one begins behind a save and one on it."""

from tests.runs import emoji_config

BOUNDARIES = (12, 25)


def get_config():
    """Returns the config."""
    config = emoji_config()
    first, second = BOUNDARIES
    config.phases = (
        {"after": first, "changes": {"model.mask_ratio": 0.25, "train.batch_size": 8}},
        {"after": second, "changes": {"optimizer.learning_rate": 1e-3}},
    )
    return config
