"""The flags of evaluations that compare two sets of features."""

from absl import flags


def define_feature_flags(values: flags.FlagValues, more: str = "") -> None:
    """Adds the flags that every comparison of two sets of features has; `more` is what the files can be besides."""
    files = f".npy files [samples, dimensions] with commas between them, or a directory of them{more}."
    flags.DEFINE_string("features", None, f"Of generated images: {files}", required=True, flag_values=values)
    flags.DEFINE_string("reference", None, f"Of real images: {files}", required=True, flag_values=values)
    named = "What made the features, such as 'pytorch-fid 0.3.0': results of two extractors do not compare."
    flags.DEFINE_string("extractor", None, f"{named} It is put into the result.", flag_values=values)
    flags.DEFINE_string("json", None, "File for the result.", flag_values=values)
