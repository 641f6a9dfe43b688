"""configs/emoji.py on the mixture of emoji_and_shapes.py."""

import runpy


def get_config():
    config = runpy.run_path("configs/emoji.py")["get_config"]()
    config.data.module = "tests/data/emoji_and_shapes.py"
    config.data.task = "emoji_and_shapes"
    config.data.captions = {"caption": 0.5, "long": 0.5}
    config.data.vocab_size = 2048
    return config
