"""Defines the flags of evaluations that compare two sets of features."""

from absl import flags


def define_feature_flags(values: flags.FlagValues, more: str = "") -> None:
    """Adds the flags that every comparison of two sets of features has; `more` describes further kinds of files."""
    files = f".npy files [samples, dimensions] with commas between them, or a directory of them{more}."
    flags.DEFINE_string("features", None, f"Features of generated images: {files}", required=True, flag_values=values)
    flags.DEFINE_string("reference", None, f"Features of real images: {files}", required=True, flag_values=values)
    named = "The features' extractor, such as 'pytorch-fid 0.3.0'. Results of two extractors are not comparable."
    flags.DEFINE_string("extractor", None, f"{named} The result names it.", flag_values=values)
    flags.DEFINE_string("json", None, "File for the result.", flag_values=values)
