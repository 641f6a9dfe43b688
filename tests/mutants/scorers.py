"""Mutants of the benchmark scorers and the distances of features."""

from tests.mutants.mutant import Mutant

_EVALUATION = "ecdit/evaluation"
_GENEVAL = f"{_EVALUATION}/geneval.py"
_MOMENTS, _FRECHET = f"{_EVALUATION}/moments.py", f"{_EVALUATION}/frechet.py"
_KERNEL, _PRECISION = f"{_EVALUATION}/kernel_distance.py", f"{_EVALUATION}/precision_recall.py"
_DSG, _DPG, _QUESTIONS = (f"{_EVALUATION}/{name}.py" for name in ("dsg", "dpg", "questions"))
_GENEVAL2 = f"{_EVALUATION}/geneval2.py"


def _tests(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/evaluation/test_{file}.py::{name}" for name in names)


MUTANTS = (
    Mutant(
        _MOMENTS,
        "usable = np.abs(part) <= LARGEST",
        "usable = np.isfinite(part)",
        _tests("frechet", "test_features_without_moments_are_refused"),
        "distances overflow, and all are inside of a ball that is infinite",
    ),
    Mutant(
        _MOMENTS,
        "for key in keys if key in file.files}",
        "for key in file.files}",
        _tests("frechet", "test_of_another_program_s_file_only_the_moments_are_read"),
        "a reference batch's images, some gigabytes, are read too",
    ),
    Mutant(
        _GENEVAL,
        "order = np.argsort(scores)[::-1]",
        "order = np.argsort(scores)",
        _tests("geneval", "test_the_best_boxes_come_first_whatever_the_order_of_the_file"),
        "colour and position are asked of the worst boxes",
    ),
    Mutant(
        _GENEVAL,
        'threshold = np.float32(COUNTING_THRESHOLD if tag == "counting" else THRESHOLD)',
        'threshold = np.float64(COUNTING_THRESHOLD if tag == "counting" else THRESHOLD)',
        _tests("geneval", "test_scores_are_compared_strictly_and_in_float32"),
    ),
    Mutant(
        _GENEVAL,
        "return order[scores[order] > threshold][:MAX_OBJECTS]",
        "return order[scores[order] >= threshold][:MAX_OBJECTS]",
        _tests("geneval", "test_scores_are_compared_strictly_and_in_float32"),
    ),
    Mutant(
        _GENEVAL,
        "return order[scores[order] > threshold][:MAX_OBJECTS]",
        "return order[scores[order] > threshold]",
        _tests("geneval", "test_at_most_sixteen_objects_of_a_class_count"),
    ),
    Mutant(
        _GENEVAL,
        'COUNTING_THRESHOLD if tag == "counting" else THRESHOLD',
        "THRESHOLD",
        _tests("geneval", "test_counting_counts_only_scores_above_nine_tenths"),
    ),
    Mutant(
        _GENEVAL,
        "colours = [image.colours[clause.name][box] for box in best]",
        "colours = [image.colours[clause.name][box] for box in range(len(best))]",
        _tests("geneval", "test_the_colour_is_that_of_the_best_box"),
        "the colours are those of the first boxes of the file",
    ),
    Mutant(
        _GENEVAL,
        "dx, dy = revised / np.linalg.norm(offset)",
        "dx, dy = revised / np.linalg.norm(revised)",
        _tests("geneval", "test_relations_by_hand"),
    ),
    Mutant(
        _GENEVAL,
        "(sizes[0] + sizes[1])",
        "sizes[0]",
        _tests("geneval", "test_relations_count_the_sizes_of_both_boxes"),
    ),
    Mutant(
        _GENEVAL,
        "if np.all(np.abs(revised) < 1e-3):",
        "if np.any(np.abs(revised) < 1e-3):",
        _tests("geneval", "test_relations_by_hand"),
        "an object straight above another has no position",
    ),
    Mutant(
        _GENEVAL,
        'RELATIONS = ("left of", "right of", "above", "below")',
        'RELATIONS = ("left of", "right of", "below", "above")',
        _tests("geneval", "test_relations_by_hand"),
        "y grows upwards",
    ),
    Mutant(
        _GENEVAL,
        "groups.append(None if wrong else found)",
        "groups.append(found)",
        _tests("geneval", "test_a_target_that_was_not_found_is_the_reason"),
    ),
    Mutant(
        _GENEVAL,
        ">= clause.count:\n            reasons.append",
        "> clause.count:\n            reasons.append",
        _tests("geneval", "test_counting_has_a_lower_and_an_upper_bound"),
    ),
    Mutant(
        _GENEVAL,
        '"overall": float(np.mean(list(shares.values())))',
        '"overall": float(np.mean(sum(tasks.values(), [])))',
        _tests("geneval", "test_the_score_is_the_mean_of_the_tasks_and_not_of_the_images"),
    ),
    Mutant(
        _QUESTIONS,
        'float(answer == "yes")',
        'float(answer.lower().startswith("yes"))',
        _tests("dependent_questions", "test_dsg_counts_exact_yes_alone"),
    ),
    Mutant(
        _QUESTIONS,
        "if (parent := int(part)) != 0)",
        "if (parent := int(part)) is not None)",
        _tests("dependent_questions", "test_cells_of_the_dependency_column"),
        "every item is null, as no question has the id 0",
    ),
    Mutant(
        _DSG,
        "        return None\n",
        "        return 0.0\n",
        _tests("dependent_questions", "test_an_unknown_parent_makes_an_item_null_and_no_mean_counts_it"),
        "an error of the table counts as one of the images",
    ),
    Mutant(
        _DPG,
        "scores[i] = np.where(scores[row[parent]] == 0, 0, scores[i])",
        "scores[i] = np.where(own[row[parent]] == 0, 0, scores[i])",
        _tests("dependent_questions", "test_dpg_zeros_cascade"),
        "DSG's rule in the place of DPG-Bench's",
    ),
    Mutant(
        _DPG,
        "for i, question in enumerate(questions):\n        for parent",
        "for i, question in sorted(enumerate(questions), key=lambda turn: turn[1].number):\n        for parent",
        _tests("dependent_questions", "test_dpg_cascades_in_the_order_of_the_file_and_not_of_ids"),
    ),
    Mutant(
        _DPG,
        "own_scores(item).mean(axis=1)",
        "own_scores(item)[:, -1]",
        _tests("dependent_questions", "test_dpg_s_categories_count_all_images_and_all_rows_before_dependencies"),
        "categories are those of the last image, as in the original",
    ),
    Mutant(
        _GENEVAL2,
        "return float(np.exp(np.mean(np.log(np.asarray(scores, np.float64)))))",
        "return float(np.prod(scores) ** (1 / len(scores)))",
        _tests("geneval2", "test_tiny_probabilities_keep_their_geometric_mean"),
    ),
    Mutant(
        _GENEVAL2,
        "skills[skill].append(score)",
        "skills[skill].append(min(score, 1.0))",
        _tests("geneval2", "test_the_whole_benchmark_against_the_original_s_sums", "test_nothing_is_clipped"),
    ),
    Mutant(
        _MOMENTS,
        "block -= shift[None]",
        "block -= 0 * shift[None]",
        _tests("frechet", "test_a_small_spread_beside_a_large_mean_is_kept"),
    ),
    Mutant(
        _MOMENTS,
        "products /= count - 1",
        "products /= count",
        _tests("frechet", "test_moments_are_numpy_s"),
    ),
    Mutant(
        _MOMENTS,
        "part = shard[start : start + size - sum(map(len, pending))].astype(np.float64)",
        "part = shard[start : start + size].astype(np.float64)",
        _tests("frechet", "test_moments_are_the_same_bits_however_the_rows_are_split"),
        "the result depends on how features are split into files",
    ),
    Mutant(
        _FRECHET,
        "kept = values > rounding",
        "kept = values > 0",
        _tests("frechet", "test_a_set_of_low_rank_beside_a_full_one"),
    ),
    Mutant(
        _FRECHET,
        "if factor is not None and factor_a is not None:",
        "if factor is not None:",
        _tests("frechet", "test_a_set_of_low_rank_beside_a_full_one"),
    ),
    Mutant(
        _FRECHET,
        "seen, rounding = axes.T @ b @ axes, _rounding(b)",
        "seen, rounding = axes.T @ b @ axes, 0.0",
        _tests("frechet", "test_orthogonal_sets_of_low_rank_have_no_root_in_common"),
    ),
    Mutant(
        _KERNEL,
        "(values.sum() - np.trace(values)) / (len(x) * (len(x) - 1))",
        "values.mean()",
        _tests("kernel_distance", "test_the_unbiased_discrepancy_by_hand"),
    ),
    Mutant(
        _KERNEL,
        "(2 * CMMD_SIGMA**2)",
        "CMMD_SIGMA**2",
        _tests("kernel_distance", "test_cmmd_by_hand"),
    ),
    Mutant(
        _PRECISION,
        "inside += int((distances <= radii[None]).any(axis=1).sum())",
        "inside += int((distances < radii[None]).any(axis=1).sum())",
        _tests("precision_recall", "test_precision_and_recall_by_hand"),
    ),
    Mutant(
        _PRECISION,
        "np.partition(distances, neighbours, axis=1)[:, neighbours]",
        "np.partition(distances, neighbours, axis=1)[:, neighbours - 1]",
        _tests("precision_recall", "test_the_radius_is_the_distance_to_the_third_nearest_other"),
        "each feature is its own first neighbour",
    ),
    Mutant(
        "ecdit/commands/geneval_score.py",
        "verdicts = judge_lines(Path(values.detections))",
        'verdicts = (out.write_text(""), judge_lines(Path(values.detections)))[1]',
        _tests("scorer_commands", "test_one_wrong_line_leaves_no_file_and_old_results_as_they_are"),
    ),
)
