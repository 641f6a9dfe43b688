"""`geneval --images=DIR --detector=FOLDER --clip=FOLDER --out=F.jsonl` detects objects for geneval-score."""

from pathlib import Path

from absl import flags

from ecdit.errors import UserError
from ecdit.evaluation.geneval_images import look, samples, state_of
from ecdit.json_lines import result_paths
from ecdit.progress import each

DOWNLOAD = """needs a detector, and a CLIP where prompts name colours. Download them once:
  hf download facebook/mask2former-swin-small-coco-instance \\
      config.json model.safetensors --local-dir weights/mask2former
  hf download openai/clip-vit-large-patch14 config.json model.safetensors \\
      vocab.json merges.txt tokenizer_config.json special_tokens_map.json --local-dir weights/clip-l
and give --detector=weights/mask2former --clip=weights/clip-l. pip install 'ecdit[evaluation]' installs the packages."""


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags of this evaluation."""
    images = "A directory in GenEval's layout, as ecdit.sample --format=geneval writes it."
    flags.DEFINE_string("images", None, images, required=True, flag_values=values)
    flags.DEFINE_string("out", None, "File for the lines of geneval-score.", required=True, flag_values=values)
    detector = "A Mask2Former's folder as transformers writes it: config.json and safetensors, COCO's 80 classes."
    flags.DEFINE_string("detector", None, detector, flag_values=values)
    clip = "A CLIP's folder as transformers writes it, with its tokenizer's files; the original's is ViT-L/14."
    flags.DEFINE_string("clip", None, clip, flag_values=values)
    flags.DEFINE_string("device", "cpu", "PyTorch's device for the detector, such as cuda.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Makes and writes the lines."""
    (out,) = result_paths(values, "out", local=["out"])
    assert out is not None, "--out is required"
    wanted = samples(Path(values.images))
    coloured = any(sample.coloured for sample in wanted)
    for name, needed in (("detector", True), ("clip", coloured)):
        folder = getattr(values, name)
        if needed and (folder is None or not Path(folder).is_dir()):
            given = " is missing" if folder is None else f"={folder} is no directory"
            raise UserError(f"--{name}{given}. GenEval {DOWNLOAD}")
    # Here, so that a missing folder is said before JAX and PyTorch are imported.
    from ecdit.evaluation.clip_score import read_clip
    from ecdit.evaluation.geneval_colours import colour_classifier
    from ecdit.evaluation.geneval_detector import detect, read_detector
    from ecdit.pretrained.weights import fingerprint

    network = read_detector(Path(values.detector), values.device)
    made_by = {**state_of(Path(values.images), wanted), "detector": fingerprint(Path(values.detector))}
    classify = None
    if coloured:
        classify = colour_classifier(read_clip(Path(values.clip)))
        made_by["clip"] = fingerprint(Path(values.clip))
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = look(wanted, lambda image: detect(network, image), classify, made_by, out)
    for _ in each(lines, "detecting", "images", len(wanted)):
        pass
    print(f"{len(wanted)} images; now: python -m ecdit.evaluate geneval-score --detections={out} --out=results.jsonl")
