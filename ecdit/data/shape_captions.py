"""Writes captions of the `shapes` data, in GenEval's six kinds, and the metadata that a judge reads."""

from typing import Any

from ecdit.data.shape_scenes import COLORS, SHAPES, Draws, Scene

OPENINGS = ("", "a picture of ", "an image of ", "a drawing of ")
JOINTS = ("and", "with")
WORDINGS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
PLURALS = {shape: f"{shape}es" if shape.endswith("s") else f"{shape}s" for shape in SHAPES}
NUMBERS = {2: "two", 3: "three", 4: "four"}


def _vocabulary() -> tuple[str, ...]:
    phrases = [*OPENINGS, *JOINTS, "a an", *(wording for wordings in WORDINGS.values() for wording in wordings)]
    words = " ".join([*phrases, *NUMBERS.values(), *COLORS, *PLURALS, *PLURALS.values()]).split()
    return tuple(dict.fromkeys(words))


VOCABULARY = _vocabulary()  # all words of captions


def caption_of(scene: Scene, draws: Draws) -> str:
    """Returns the caption of a scene; `draws` chooses among the wordings of its kind."""
    colors = [placed.color if scene.states_colors else "" for placed in scene.objects]
    shapes = [placed.shape for placed in scene.objects]
    if scene.kind == "counting":
        body = " ".join(filter(None, [NUMBERS[len(shapes)], colors[0], PLURALS[shapes[0]]]))
    else:
        joint = draws.choice(WORDINGS[scene.relation] if scene.relation else JOINTS)
        body = f" {joint} ".join(_one(color, shape) for color, shape in zip(colors, shapes, strict=True))
    return draws.choice(OPENINGS) + body


def metadata_of(scene: Scene, caption: str) -> dict[str, Any]:
    """Returns the caption's claims as GenEval's metadata: tag, include, exclude (counting only) and prompt.

    An item of `include` is {"class", "count", "color" if it is stated, "position": [relation, index of its target]}.
    """
    counted = scene.objects[:1] if scene.kind == "counting" else scene.objects
    include: list[dict[str, Any]] = [
        {
            "class": placed.shape,
            "count": len(scene.objects) if scene.kind == "counting" else 1,
            **({"color": placed.color} if scene.states_colors else {}),
        }
        for placed in counted
    ]
    metadata: dict[str, Any] = {"tag": scene.kind, "include": include}
    if scene.kind == "counting":
        metadata["exclude"] = [{"class": include[0]["class"], "count": include[0]["count"] + 1}]
    if scene.relation:
        include.reverse()  # a target comes before what refers to it
        include[1]["position"] = [scene.relation, 0]
    return {**metadata, "prompt": caption}


def _one(color: str, shape: str) -> str:
    words = f"{color} {shape}".strip()
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"
