"""Mutants of the mesh and of the sharding over it."""

from tests.mutants.mutant import Mutant

_FILE = "ecdit/partitioning.py"


def _tests(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/models/test_partitioning.py::{name}" for name in names)


MUTANTS = (
    Mutant(
        _FILE,
        'BATCH_AXES = ("slices", "data", "fsdp", "expert")',
        'BATCH_AXES = ("slices", "data", "fsdp")',
        _tests("test_a_batch_is_split_over_all_but_tensor"),
        "the chips of the axis expert all compute the same",
    ),
    Mutant(
        _FILE,
        'BATCH_AXES = ("slices", "data", "fsdp", "expert")',
        'BATCH_AXES = ("slices", "data", "expert", "fsdp")',
        _tests("test_a_batch_is_split_over_all_but_tensor"),
        "tokens are exchanged between chips that are far from each other",
    ),
    Mutant(
        _FILE,
        '"experts": ("expert",),',
        '"experts": (),',
        ("tests/system/test_step.py::test_moments_and_ema_are_sharded_like_their_parameters",),
        "every chip holds all experts",
    ),
    Mutant(
        _FILE,
        '"expert_mlp": ("tensor", "fsdp"),',
        '"expert_mlp": ("tensor",),',
        ("tests/test_system.py::test_large_parameters_are_split_over_all_of_fsdp_expert_and_tensor",),
        "experts are not sharded over fsdp",
    ),
    Mutant(
        _FILE,
        "by_size = sorted(axes, key=lambda name: -mesh.shape[name])",
        "by_size = sorted(axes, key=lambda name: mesh.shape[name])",
        _tests("test_shards_of_a_width_are_whole_tiles_where_they_can_be"),
    ),
    Mutant(
        _FILE,
        "if -1 in sizes and num_devices % fixed == 0:",
        "if -1 in sizes:",
        _tests("test_meshes_that_do_not_fit_the_devices_are_refused"),
    ),
    Mutant(
        _FILE,
        "sizes[sizes.index(-1)] = num_devices // fixed",
        "sizes[1] = num_devices // fixed",
        _tests("test_the_free_axis_takes_what_the_devices_leave"),
    ),
    Mutant(
        _FILE,
        "return math.prod(mesh.shape[axis] for axis in BATCH_AXES)",
        "return math.prod(mesh.shape.values())",
        _tests("test_a_batch_is_split_over_all_but_tensor"),
    ),
    Mutant(
        _FILE,
        "if axis is not None and axis not in AXIS_RULES:",
        "if axis is not None and axis not in AXIS_RULES and axis in MESH_AXES:",
        _tests("test_an_axis_without_a_rule_is_an_error"),
    ),
    Mutant(
        _FILE,
        "if size % math.prod(parts.values()):",
        "if size < math.prod(parts.values()):",
        _tests("test_sizes_that_do_not_divide_are_refused_with_the_numbers"),
    ),
    Mutant(
        "ecdit/tuned/experts.py",
        '"fsdp", [(0, 1), (1, 0)])',
        '"fsdp", [(0, 0), (1, 1)])',
        _tests("test_tuned_is_plain[data-fsdp-expert-halves-minimal]"),
        "with halves each chip uses its own half of an expert twice",
    ),
    Mutant(
        "ecdit/models/layers.py",
        'transform_metadata={nnx.PARTITION_NAME: "layers"}',
        'transform_metadata={nnx.PARTITION_NAME: "experts"}',
        ("tests/models/test_layers.py::test_a_stack_has_an_axis_of_layers",),
    ),
    Mutant(
        "ecdit/models/config.py",
        'config.expert_products != "halves" or config.ffn == "dense" or fsdp == 2,',
        'config.expert_products != "halves" or config.ffn == "dense" or fsdp >= 2,',
        ("tests/models/test_config.py::test_halves_of_experts_are_refused_where_they_are_not_on_two_chips",),
        "two of four chips' parts of an expert would be left out",
    ),
    Mutant(
        "ecdit/experiment.py",
        "parts, system = shards * train.accumulation, make",
        "parts, system = shards, make",
        ("tests/system/test_step.py::test_what_does_not_divide_is_refused_with_its_numbers",),
    ),
    Mutant(
        "ecdit/experiment.py",
        "    for phase in experiment.resolved_phases():\n        _check_phase(phase.experiment, mesh)",
        "    for phase in experiment.resolved_phases()[:1]:\n        _check_phase(phase.experiment, mesh)",
        ("tests/test_experiment_phases.py::test_every_phase_must_fit_the_mesh",),
        "a run stops at its second phase, days after its start",
    ),
)
