"""A user's tasks: emoji with two captions each, in a mixture with shapes."""

import dataclasses

from ecdit.data.emoji import Emoji
from ecdit.data.tasks import add_mixture, add_task


@dataclasses.dataclass(frozen=True)
class TwoCaptions(Emoji):
    def read(self, part):
        for pair in super().read(part):
            yield dataclasses.replace(pair, captions={**pair.captions, "long": f"this is {pair.captions['caption']}"})


add_task("emoji_twice", TwoCaptions())
add_mixture("emoji_and_shapes", [("emoji_twice", 0.3), ("shapes", 0.7)])
