"""Defines the flags of evaluations that compare two sets of images or of features, and reads what they name."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from absl import flags
from jaxtyping import Float

from ecdit.errors import UserError
from ecdit.evaluation.feature_files import read_features, read_moments_or_features
from ecdit.evaluation.image_files import check_sizes, image_files
from ecdit.evaluation.moments import Moments, moments
from ecdit.evaluation.preparation import VARIANTS

if TYPE_CHECKING:
    from ecdit.evaluation.image_features import Extractor

DEFAULT = "clean-fid"
INCEPTION = """a folder with Inception's weights of 2015-12-05 in safetensors. They are published as a pickle:
  mkdir -p weights/inception
  curl -L -o weights/inception/pt_inception-2015-12-05-6726825d.pth https://github.com/mseitzer/pytorch-fid/releases/\
download/fid_weights/pt_inception-2015-12-05-6726825d.pth
and the error of the next call has the command that converts it."""
CLIP = """the folder of a CLIP; CMMD's is ViT-L/14 for 336 px:
  hf download openai/clip-vit-large-patch14-336 config.json model.safetensors --local-dir weights/clip-l-336"""


def define_feature_flags(
    values: flags.FlagValues, more: str = "", network: Literal["inception", "clip"] = "inception"
) -> None:
    """Adds the flags that every comparison of two sets has.

    Args:
      values: where they are added.
      more: describes further kinds of files of features.
      network: what computes the features of images.
    """
    files = f".npy files [samples, dimensions] with commas between them, or a directory of them{more}"
    flags.DEFINE_string("features", None, f"Features of generated images: {files}.", flag_values=values)
    images = "A directory of generated images, in place of --features."
    flags.DEFINE_string("images", None, images, flag_values=values)
    reference = f"Features of real images: {files}; or a directory of images."
    flags.DEFINE_string("reference", None, reference, required=True, flag_values=values)
    if network == "inception":
        folder = "The folder of Inception's weights, for images: model.safetensors."
        variants = "The package whose preparation of images is followed. Results of two of them are not comparable."
        flags.DEFINE_enum("preprocessing", DEFAULT, list(VARIANTS), variants, flag_values=values)
    else:
        folder = "The folder of a CLIP, for images, as transformers writes it."
    flags.DEFINE_string(network, None, folder, flag_values=values)
    flags.DEFINE_integer("batch_size", 32, "Images at a time.", 1, flag_values=values)
    mixed = "Take images of several sizes; each is squeezed to the network's own square."
    flags.DEFINE_bool("mixed_sizes", False, mixed, flag_values=values)
    named = "The extractor of files of features, such as 'pytorch-fid 0.3.0'. Those of two extractors do not compare."
    flags.DEFINE_string("extractor", None, f"{named} The result names it.", flag_values=values)
    flags.DEFINE_string("json", None, "File for the result.", flag_values=values)


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """One of the two sets that the flags name: files of features, or images with what computes theirs."""

    flag: str
    text: str
    images: Sequence[Path]  # none for files of features
    extractor: "Extractor | None"  # of images
    batch_size: int
    stated: str | None  # the extractor of files of features, by the flag

    @property
    def name(self) -> str:
        """Returns the flag, for messages."""
        return f"--{self.flag}"

    @property
    def extractor_name(self) -> str | None:
        """Returns the name of what computed the features, or None for files of which the flags do not say it."""
        return self.extractor.name if self.extractor is not None and self.images else self.stated

    @property
    def dimensions(self) -> int:
        """Returns those of images' features, D, and 0 where they are not known yet, as those of files."""
        return self.extractor.dimensions if self.extractor is not None and self.images else 0

    def features(self) -> Float[np.ndarray, "N D"]:
        """Returns all features, in float64. Raises UserError if there are none, or a value is not finite."""
        if not self.images:
            return read_features(self.text, self.name)
        return np.concatenate(list(self._shards())).astype(np.float64)

    def moments(self) -> Moments:
        """Returns the moments. Raises UserError if there are none, or a value is not finite."""
        if self.extractor is None or not self.images:
            return read_moments_or_features(self.text, self.name)
        return dataclasses.replace(moments(self._shards()), extractor=self.extractor.name)

    def _shards(self) -> Iterator[np.ndarray]:
        from ecdit.evaluation.image_features import image_features  # here: files of features need no JAX

        assert self.extractor is not None
        return image_features(self.images, self.extractor, self.batch_size)


def feature_sets(values: flags.FlagValues) -> tuple[tuple[FeatureSet, FeatureSet], dict[str, Any]]:
    """Returns the generated and the real set that the flags name, and what to say of their features in the result.

    Raises:
      UserError: flags are missing, contradict each other or name folders that are none.
    """
    if (values.features is None) == (values.images is None):
        raise UserError("give either --features or --images")
    flag = "features" if values.images is None else "images"
    has_images = {flag: values.images is not None, "reference": _holds_images(values.reference)}
    files = {name: _images(name, values) if has_images[name] else [] for name in has_images}
    extractor = _extractor(values) if any(files.values()) else None
    if values.extractor is not None and extractor is not None:
        raise UserError(f"--extractor={values.extractor}: images have that of their network; leave it out")
    generated, real = (
        FeatureSet(name, getattr(values, name), found, extractor, values.batch_size, values.extractor)
        for name, found in files.items()
    )
    said = name_extractors(generated.extractor_name, real.extractor_name)
    if extractor is not None and "preprocessing" in values:
        said["preprocessing"] = values.preprocessing
    return (generated, real), said


def files_first(sets: Sequence[FeatureSet]) -> list[FeatureSet]:
    """Returns the sets with files of features first: an error in them should not cost the hours that images take."""
    return sorted(sets, key=lambda each: len(each.images) > 0)


def both_features(sets: Sequence[FeatureSet]) -> list[Float[np.ndarray, "N D"]]:
    """Returns all features of each set. Raises as `FeatureSet.features`."""
    found = {each.flag: each.features() for each in files_first(sets)}
    return [found[each.flag] for each in sets]


def name_extractors(generated: str | None, real: str | None) -> dict[str, str | None]:
    """Returns the fields of a result for the extractors of the two sets; None is one that is not known."""
    return {"extractor": generated} | ({} if real == generated else {"reference_extractor": real})


def _holds_images(text: str) -> bool:
    """Returns whether a path is a directory that has no features."""
    return Path(text).is_dir() and not any(Path(text).glob("*.npy"))


def _images(flag: str, values: flags.FlagValues) -> list[Path]:
    folder = getattr(values, flag)
    files = image_files(Path(folder), f"--{flag}")
    if not values.mixed_sizes:
        check_sizes(files, f"--{flag}={folder}")
    return files


def _extractor(values: flags.FlagValues) -> "Extractor":
    network, needed = ("inception", INCEPTION) if "inception" in values else ("clip", CLIP)
    folder = getattr(values, network)
    if folder is None:
        raise UserError(f"--{network} is missing: images need {needed}")
    from ecdit.evaluation.image_features import clip_extractor, inception_extractor

    if network == "clip":
        return clip_extractor(Path(folder))
    return inception_extractor(Path(folder), values.preprocessing)
