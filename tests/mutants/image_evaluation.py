"""Mutants of evaluations that read images: GenEval's detections and colours, and features for distances."""

from tests.mutants.mutant import Mutant

_DETECTOR, _COLOURS, _IMAGES = (f"ecdit/evaluation/geneval_{name}.py" for name in ("detector", "colours", "images"))
_RESIZING, _PREPARATION, _FEATURES, _FILES = (
    f"ecdit/evaluation/{name}.py" for name in ("resizing", "preparation", "image_features", "image_files")
)


def _detections(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/evaluation/test_geneval_detections.py::{name}" for name in names)


def _features(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/evaluation/test_image_features.py::{name}" for name in names)


MUTANTS = (
    Mutant(
        _DETECTOR,
        "found[:, 4] *= scores[best]",
        "found[:, 4] = scores[best]",
        _detections("test_a_box_and_its_score_by_hand"),
        "boxes whose masks the detector doubts count",
    ),
    Mutant(
        _DETECTOR,
        "(bilinear(cut, last) @ bilinear(small, whole)[:cut]).astype(np.float32)",
        "bilinear(small, last).astype(np.float32)",
        _detections("test_padding_is_cut_before_masks_get_the_image_s_size"),
        "boxes are squeezed by the share of padding, and positions are wrong",
    ),
    Mutant(
        _DETECTOR,
        "int(x[-1]) + 1, int(y[-1]) + 1",
        "int(x[-1]), int(y[-1])",
        _detections("test_a_box_and_its_score_by_hand"),
        "crops for colours lack a row and a column",
    ),
    Mutant(
        _DETECTOR,
        "scale = min(LONGEST / max(height, width), SHORTEST / min(height, width))",
        "scale = SHORTEST / min(height, width)",
        _detections("test_an_image_is_scaled_and_padded"),
    ),
    Mutant(
        _COLOURS,
        "return Image.composite(image, blank, Image.fromarray(mask))",
        "return Image.composite(blank, image, Image.fromarray(mask))",
        _detections("test_an_object_is_cut_out_on_grey"),
        "the background's colour is named",
    ),
    Mutant(
        _COLOURS,
        "normalised(normalised(encoded).reshape(",
        "normalised(encoded.reshape(",
        _detections("test_a_colour_s_embedding_is_the_mean_of_three_of_length_one"),
    ),
    Mutant(
        _IMAGES,
        "masks = [found.masks[query] for query in found.queries[of_class][counted].tolist()]",
        "masks = [found.masks[query] for query in found.queries[counted].tolist()]",
        _detections("test_each_box_is_given_the_mask_of_its_own_query"),
        "a box's colour is judged behind another object's mask",
    ),
    Mutant(
        _IMAGES,
        "colours[name][box] = colour",
        "colours[name][len(boxes) - 1 - box] = colour",
        _detections("test_only_boxes_that_can_count_have_colours"),
    ),
    Mutant(
        _IMAGES,
        "if sample.filename not in done:",
        "if True:",
        _detections("test_an_unreadable_image_is_named_and_the_lines_before_it_are_kept"),
        "a run that was interrupted begins again",
    ),
    Mutant(
        _RESIZING,
        "(np.arange(after) + 0.5) * before / after - 0.5",
        "np.arange(after) * (before - 1) / max(after - 1, 1)",
        _features("test_interpolation_by_hand"),
        "corners are aligned, and FIDs are no package's",
    ),
    Mutant(
        _PREPARATION,
        "return _around_zero(_matrices(image, tensorflow_bilinear))",
        "return _around_zero(_matrices(image, bilinear))",
        _features("test_variants_differ_in_what_they_make_of_stripes"),
    ),
    Mutant(
        _PREPARATION,
        "_around_zero(np.clip(_pillow(image, Image.Resampling.BICUBIC), 0, 255))",
        "_around_zero(_pillow(image, Image.Resampling.BICUBIC))",
        _features("test_bicubic_overshoot_is_clipped_and_not_rounded"),
    ),
    Mutant(
        _IMAGES,
        "hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None",
        "None",
        _detections("test_lines_of_images_that_were_drawn_again_are_not_continued"),
        "half of the lines are of images by other weights",
    ),
    Mutant(
        "ecdit/commands/feature_flags.py",
        "return self.extractor.name if self.extractor is not None and self.images else self.stated",
        "return self.extractor.name if self.extractor is not None else self.stated",
        _features("test_the_extractor_of_images_is_not_said_of_files_beside_them"),
    ),
    Mutant(
        _FEATURES,
        "found = extractor.features(filled)[: len(batch)]",
        "found = extractor.features(filled)",
        _features("test_features_come_in_the_files_order_whatever_the_batch"),
        "the images that fill up the last batch count twice",
    ),
    Mutant(
        _FILES,
        "if size != first[1]:",
        "if size[0] != first[1][0]:",
        _features("test_mixed_sizes_are_refused_with_two_examples"),
    ),
    Mutant(
        _FILES,
        '_CLIPPED_MODES = ("I", "F", "I;16",',
        '_CLIPPED_MODES = ("I", "F",',
        _features("test_images_that_pillow_would_clip_to_white_or_black_are_refused"),
        "a 16-bit grey image is white",
    ),
)
