"""Mutants of the launchers and of sweeps."""

from tests.mutants.mutant import Mutant

_JOB, _LOCAL, _CHECK, _STARTING = (f"launch/{name}.py" for name in ("job", "local", "check", "starting"))
_VALUES, _WORKER = "launch/values.py", "launch/worker.py"
_COLLECTING = "tests/launch/test_collecting.py::test_runs_that_are_not_what_the_sweep_says_are_left_out_and_listed"
_OTHER_FILES = "tests/launch/test_collecting.py::test_a_run_that_read_another_version_of_a_user_s_file_does_not_count"
_JOBSET, _TPU_VM, _LOCAL_BACKEND = (f"launch/backends/{name}.py" for name in ("jobset", "tpu_vm", "local"))


def _job(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/launch/test_job.py::{name}" for name in names)


def _jobset(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/launch/test_jobset.py::{name}" for name in names)


def _tpu_vm(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/launch/test_tpu_vm.py::{name}" for name in names)


def _backends(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/launch/test_backends.py::{name}" for name in names)


def _local(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/launch/test_local.py::{name}" for name in names)


MUTANTS = (
    Mutant(
        _JOB,
        "RESTART_CODES = (PREEMPTED, HUNG, OUTAGE, *SIGNAL_CODES)",
        "RESTART_CODES = (HUNG, OUTAGE, *SIGNAL_CODES)",
        _job("test_what_training_ends_with_after_a_save_is_restarted"),
        "a preempted run is not started again",
    ),
    Mutant(
        _JOB,
        "for code in range(127, 256) if code != INTERRUPTED)",
        "for code in range(127, 256))",
        _job("test_a_run_that_somebody_ended_by_sigint_is_not_restarted"),
    ),
    Mutant(
        _WORKER,
        "  (( ! stopped )) || kill -TERM",
        "  (( stopped )) || kill -TERM",
        _tpu_vm("test_sigterm_that_comes_before_the_loop_knows_its_process_reaches_it"),
    ),
    Mutant(
        _TPU_VM,
        "$(find -L {file} -perm /077)",
        "$(find {file} -perm /077)",
        _tpu_vm("test_the_script_too_looks_at_the_file_of_secrets_itself_and_not_at_a_link_to_it"),
    ),
    Mutant(
        _LOCAL_BACKEND,
        '    replace_text(log_dir / RECORD, json.dumps(record, indent=2) + "\\n")',
        '    (log_dir / RECORD).write_text(json.dumps(record, indent=2) + "\\n")',
        ("tests/launch/test_local_backend.py::test_a_launcher_that_is_killed_leaves_no_half_of_its_record",),
        "launch.status ends with a traceback",
    ),
    Mutant(
        _JOB,
        "return self.checkpoint_bytes / self.hosts / bytes_per_second",
        "return self.checkpoint_bytes / bytes_per_second",
        _job("test_hosts_share_the_writing"),
    ),
    Mutant(
        _JOB,
        "return self.slice.hosts * self.slices",
        "return self.slice.hosts",
        _job("test_hosts_share_the_writing"),
    ),
    Mutant(
        _JOB,
        'digits = hashlib.sha256(workdir.rstrip("/").encode()).hexdigest()[:6]',
        "digits = hashlib.sha256(workdir.encode()).hexdigest()[:6]",
        _job("test_a_run_has_one_name_and_another_run_another"),
        "stop does not find the job where a workdir was typed with a slash",
    ),
    Mutant(
        _CHECK,
        "if job.hosts > 1 and not experiment.runtime.distributed:",
        "if job.slices > 1 and not experiment.runtime.distributed:",
        _job("test_hosts_that_would_not_join_are_refused"),
        "every host trains a run of its own, in one workdir",
    ),
    Mutant(
        _CHECK,
        "checkpoint_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state_parts(state))),",
        "checkpoint_bytes=sum(leaf.size for leaf in jax.tree.leaves(state_parts(state))),",
        _job("test_a_checkpoint_has_16_bytes_a_trained_parameter_and_4_a_frozen_one"),
        "pods are killed before they have saved",
    ),
    Mutant(
        _CHECK,
        'if slices > 1 and mesh.slices == 1 and "mesh.slices" not in overrides:',
        "if slices > 1 and mesh.slices == 1:",
        _job("test_a_mesh_that_was_given_its_slices_keeps_them"),
    ),
    Mutant(
        _STARTING,
        "if backend.has_large_hosts or LARGE_HOSTS.value:",
        "if LARGE_HOSTS.value:",
        _backends("test_a_new_backend_brings_its_flags_and_starts_jobs"),
        "a job on TPU VMs waits for a second host of v6e-8",
    ),
    Mutant(
        _STARTING,
        "    backend.check(job)\n",
        "\n",
        _backends("test_a_backend_refuses_a_job_before_its_step_is_compiled[--skip-plan]"),
        "a job that cannot run is refused after minutes of compiling, or by the cluster",
    ),
    Mutant(
        "launch/stop.py",
        "location.backend.stop(location.name, location.slices)",
        "location.backend.stop(location.name, 1)",
        _backends("test_a_new_backend_shows_and_stops_jobs[stop-7]"),
        "stop does not find the TPU VMs of several slices",
    ),
    Mutant(
        _JOBSET,
        '"operator": "NotIn", "values"',
        '"operator": "In", "values"',
        _jobset("test_it_restarts_on_the_codes_of_preemption_hangs_and_signals_alone"),
    ),
    Mutant(
        _JOBSET,
        '"replicas": job.slices,',
        '"replicas": 1,',
        _jobset("test_a_slice_is_a_job_and_a_host_a_pod"),
    ),
    Mutant(
        _JOBSET,
        '"completions": hosts,',
        '"completions": job.hosts,',
        _jobset("test_a_slice_is_a_job_and_a_host_a_pod"),
    ),
    Mutant(
        _JOBSET,
        "needed = math.ceil(job.save_seconds(options.write_rate)) + SETTLE_SECONDS",
        "needed = math.ceil(job.save_seconds(options.write_rate))",
        _jobset("test_the_grace_period_is_as_long_as_a_checkpoint_takes"),
    ),
    Mutant(
        _JOBSET,
        "return max(needed, MIN_GRACE_SECONDS)",
        "return min(needed, MIN_GRACE_SECONDS)",
        _jobset("test_the_grace_period_is_as_long_as_a_checkpoint_takes"),
        "large models never finish a save after SIGTERM",
    ),
    Mutant(
        _JOBSET,
        '"backoffLimit": 0,',
        '"backoffLimit": 6,',
        _jobset("test_it_restarts_on_the_codes_of_preemption_hangs_and_signals_alone"),
        "one host is started again, alone, and waits for the others for ever",
    ),
    Mutant(
        _WORKER,
        "if ranges and ranges[-1][1] == code - 1:",
        "if ranges:",
        _tpu_vm("test_the_loop_restarts_on_the_same_codes_as_the_other_backend[126]"),
        "all errors above 42 are tried again for ever",
    ),
    Mutant(
        _WORKER,
        '  while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done\n',
        "\n",
        _tpu_vm("test_sigterm_lets_training_save_and_ends_the_loop"),
        "the loop ends, and its VM with it, while training saves",
    ),
    Mutant(
        "launch/queued_resources.py",
        'return [name] if slices == 1 else [f"{name}-{i}" for i in range(slices)]',
        'return [name] if slices == 1 else [f"{name}-{i}" for i in range(1, slices + 1)]',
        _tpu_vm("test_one_slice_is_a_node_and_several_have_a_prefix"),
    ),
    Mutant(
        "launch/queued_resources.py",
        'if state == "ACTIVE" and run_all(saves):',
        'if run_all(saves) and state != "ACTIVE":',
        _tpu_vm(
            "test_stop_keeps_the_tpus_of_workers_that_it_does_not_reach_and_says_how_to_reach_or_release_them",
        ),
        "workers lose what they have not saved",
    ),
    Mutant(
        _TPU_VM,
        '{"on-demand": [], "spot": ["--spot"], "reserved": ["--reserved"]}',
        '{"on-demand": [], "spot": [], "reserved": ["--reserved"]}',
        _tpu_vm("test_the_tpus_are_of_the_capacity_that_was_asked_for"),
        "TPUs cost more than was asked for",
    ),
    Mutant(
        _LOCAL,
        "return child.returncode if child.returncode >= 0 else 128 - child.returncode",
        "return child.returncode if child.returncode >= 0 else 128 + child.returncode",
        _local("test_the_first_failure_counts_not_those_that_follow_from_it"),
    ),
    Mutant(
        _LOCAL,
        "                if not stopping:",
        "                if True:",
        _local("test_signals_reach_every_process_once_and_they_may_save"),
        "a second signal cuts the save of the others short",
    ),
    Mutant(
        _LOCAL,
        '"ECDIT_PROCESS_ID": str(process_id),',
        '"ECDIT_PROCESS_ID": str(process_id + 1),',
        _local("test_processes_know_whom_to_join_and_how_many_devices_they_have"),
    ),
    Mutant(
        _LOCAL,
        "if not flag.startswith(DEVICE_COUNT_FLAG)]",
        "if flag.startswith(DEVICE_COUNT_FLAG)]",
        _local("test_the_device_count_replaces_another_and_leaves_other_flags"),
    ),
    Mutant(
        _LOCAL_BACKEND,
        'f"--devices={job.slice.devices_per_host}"',
        'f"--devices={job.slice.chips}"',
        ("tests/launch/test_local_backend.py::test_every_host_is_a_process_with_the_devices_of_its_chips",),
    ),
    Mutant(
        _LOCAL_BACKEND,
        'return bool(state) and not state.startswith("Z") and plain == noted',
        'return bool(state) and not state.startswith("Z")',
        ("tests/launch/test_local_backend.py::test_a_process_that_got_the_number_of_an_ended_one_is_left_alone",),
        "stop ends a stranger's process",
    ),
    Mutant(
        "launch/sweeps/running.py",
        "differences += point.file_differences(recorded_files(workdir)) if done else []",
        "differences += []",
        (_OTHER_FILES,),
        "points that were trained on other data count as done",
    ),
    Mutant(
        "launch/sweeps/collecting.py",
        "differences = point.file_differences(recorded_files(workdir))",
        "differences = []",
        (_OTHER_FILES,),
        "points that were trained on other data are in the fits",
    ),
    Mutant(
        "launch/sweeps/collecting.py",
        "        if is_outage(error):",
        "        if False:",
        ("tests/launch/test_collecting.py::test_an_outage_leaves_no_run_out",),
        "a moment without network changes the fits",
    ),
    Mutant(
        "launch/sweeps/running.py",
        "done = step >= point.experiment.train.num_steps",
        "done = step > 0",
        ("tests/launch/test_sweep.py::test_a_workdir_of_another_run_is_refused_before_anything_starts",),
        "killed points are never finished",
    ),
    Mutant(
        "launch/sweeps/running.py",
        "elif code == PREEMPTED or (stopping and code == 128 + signal.SIGTERM):",
        "elif code == PREEMPTED:",
        ("tests/launch/test_sweep.py::test_a_point_that_was_stopped_before_it_listened_has_not_failed",),
    ),
    Mutant(
        "launch/sweeps/collecting.py",
        "last = [loss for at, loss in losses if first < at <= num_steps] if step >= num_steps else []",
        "last = [loss for at, loss in losses if first < at <= num_steps]",
        ("tests/launch/test_collecting.py::test_the_final_loss_is_the_mean_over_the_last_steps",),
        "runs that are not done are in the fits",
    ),
    Mutant(
        "launch/sweeps/collecting.py",
        'LOSS = "flow_loss"',
        'LOSS = "loss"',
        ("tests/launch/test_collecting.py::test_the_final_loss_is_the_mean_over_the_last_steps",),
        "token choice is compared with its balance loss",
    ),
    Mutant(
        "launch/sweeps/fitting.py",
        "spread = np.sqrt((residuals**2).sum() / (len(x) - 2))",
        "spread = np.sqrt((residuals**2).sum() / (len(x) - 1))",
        ("tests/launch/test_collecting.py::test_a_power_law_and_its_errors_as_computed_by_hand",),
    ),
    Mutant(
        "launch/sweeps/fitting.py",
        "return T_95[min(self.points - 2, len(T_95)) - 1] * self.b_error",
        "return T_95[min(self.points - 1, len(T_95)) - 1] * self.b_error",
        ("tests/launch/test_collecting.py::test_a_power_law_and_its_errors_as_computed_by_hand",),
    ),
    Mutant(
        "launch/sweeps/points.py",
        "_make_point(name, base | each | dict(overrides or {}), keys,",
        "_make_point(name, base | dict(overrides or {}) | each, keys,",
        ("tests/launch/test_hyper.py::test_points_become_flags_of_training",),
        "an override for all points is not applied to those that set the key",
    ),
    Mutant(
        _CHECK,
        "abstract_mesh(experiment.mesh, where.devices * slices)",
        "abstract_mesh(experiment.mesh, where.chips * slices)",
        _job("test_a_mesh_is_of_devices_and_a_host_of_chips"),
        "a job for TPU7x is checked for half of its devices",
    ),
    Mutant(
        _JOBSET,
        "chips = job.slice.chips_per_host",
        "chips = job.slice.devices_per_host",
        _jobset("test_a_slice_of_tpu7x_as_stated_by_hand"),
        "GKE waits for hosts with eight chips of TPU7x",
    ),
    Mutant(
        _TPU_VM,
        "if job.slice.chip not in RUNTIMES:",
        "if not RUNTIMES:",
        _tpu_vm("test_a_tpu7x_is_refused_for_it_has_no_queued_resources"),
    ),
    # Values that are read as code, secrets that are shown, jobs that are not what was checked.
    Mutant(
        _VALUES,
        'if unicodedata.category(letter) in ("Cc", "Cs")',
        'if unicodedata.category(letter) in ("Cs",)',
        _tpu_vm("test_control_characters_are_refused_wherever_they_could_end_a_line"),
        "a newline ends a line of a script, and the next one runs",
    ),
    Mutant(
        _VALUES,
        'return value.replace("$", "$$")',
        "return value",
        _jobset("test_no_value_is_rewritten_by_kubernetes_or_read_as_yaml_or_by_a_shell"),
    ),
    Mutant(
        _VALUES,
        "if name.upper().endswith(_SECRET_ENDS):",
        "if name.endswith(_SECRET_ENDS):",
        _jobset("test_a_secret_is_named_and_stands_nowhere"),
    ),
    Mutant(
        _VALUES,
        "and not unpinned and not re.fullmatch(_DIGEST, image)",
        "and unpinned and not re.fullmatch(_DIGEST, image)",
        _tpu_vm("test_an_image_without_a_digest_is_refused_unless_told"),
    ),
    Mutant(
        _WORKER,
        '  "${{command[@]}}" &\n',
        "  ${{command[*]}} &\n",
        _tpu_vm("test_no_value_is_read_as_code_on_a_worker"),
    ),
    Mutant(
        _WORKER,
        "    touch {ENDED}\n",
        "",
        _tpu_vm("test_training_goes_on_after_a_reboot_and_an_ended_run_does_not"),
        "a run that failed starts again at every boot",
    ),
    Mutant(
        _WORKER,
        "sudo systemctl enable --now {UNIT}",
        "sudo systemctl start --now {UNIT}",
        _tpu_vm("test_training_goes_on_after_a_reboot_and_an_ended_run_does_not"),
        "a reboot ends the run",
    ),
    Mutant(
        _TPU_VM,
        '"umask 077",',
        '"umask 022",',
        _tpu_vm("test_no_value_is_read_as_code_where_the_script_runs"),
        "others can read the secrets on a worker",
    ),
    Mutant(
        _TPU_VM,
        "if mode & 0o077:",
        "if mode & 0o007:",
        _tpu_vm("test_a_file_of_secrets_that_others_can_read_or_that_lacks_one_is_refused"),
    ),
    Mutant(
        _TPU_VM,
        "for name in (*CODE, LOCK, BUILD_LOCK) if not (ROOT / name).exists()",
        "for name in () if not (ROOT / name).exists()",
        _tpu_vm("test_an_installed_package_is_no_checkout_and_is_refused_before_tpus_are_asked_for"),
    ),
    Mutant(
        _JOBSET,
        """for letter in set(path or "") & set(""",
        """for letter in set(path or "") - set(""",
        _jobset("test_what_gke_would_not_run_is_refused", "test_prepared_data_is_mounted_from_its_bucket"),
        "a comma in --data adds a mount option",
    ),
    Mutant(
        _JOBSET,
        'changes = {"data.directory": DATA_MOUNT}',
        "changes = {}",
        _jobset("test_mounted_data_is_part_of_what_the_trainer_compares"),
        "every job with --data is refused by its trainer",
    ),
    Mutant(
        _CHECK,
        "if path.resolve() != (ROOT / path).resolve():",
        "if not (ROOT / path).exists():",
        ("tests/launch/test_commands.py::test_a_config_of_another_directory_is_not_taken_for_the_checkouts",),
    ),
    Mutant(
        "ecdit/runs/checked.py",
        'if wanted["code"] != here["code"]:',
        'if not wanted["code"]:',
        ("tests/ecdit_runs/test_checked.py::test_other_sources_are_refused",),
    ),
    Mutant(
        "ecdit/train.py",
        "    if CHECKED.value:\n",
        "    if not CHECKED.value:\n",
        ("tests/ecdit_runs/test_checked.py::test_the_trainer_refuses_before_it_makes_anything",),
    ),
    Mutant(
        "ecdit/command_line.py",
        "os._exit(OUTAGE if is_temporary(problem) else 2)",
        "os._exit(2)",
        ("tests/commands/test_command_line.py::test_an_outage_ends_with_the_code_that_launchers_restart",),
    ),
    Mutant(
        "ecdit/storage.py",
        "            else:\n                self.buffer, self.failing_since = [], None\n",
        "            self.buffer, self.failing_since = [], None\n",
        ("tests/system/test_gcs.py::test_data_is_kept_and_tried_again_in_an_outage",),
        "metrics of an outage are lost",
    ),
    Mutant(
        "launch/sweeps/collecting.py",
        "    rows = [] if left_out else rows\n",
        "",
        (_COLLECTING,),
        "a run of another seed is in the table",
    ),
    Mutant(
        "launch/sweeps/collecting.py",
        "for at, step in enumerate(steps, 1) if step != at",
        "for at, step in enumerate(steps, 1) if step < at",
        (_COLLECTING,),
        "missing steps are not noticed",
    ),
    Mutant(
        "ecdit/planning/cache.py",
        "for phase in experiment.resolved_phases():",
        "for phase in experiment.resolved_phases()[:1]:",
        ("tests/planning/test_cache.py::test_a_short_phase_that_does_not_fit_is_named",),
    ),
    Mutant(
        "ecdit/planning/cache.py",
        ' | {name: os.environ.get(name, "") for name in _FLAGS}',
        "",
        ("tests/planning/test_cache.py::test_flags_that_the_environment_gives_the_compiler_make_plans_anew",),
    ),
    Mutant(
        "ecdit/runs/trained_run.py",
        "experiment.runtime, distributed=join)",
        "experiment.runtime)",
        ("tests/ecdit_runs/test_trained_run.py::test_a_run_of_a_pod_opens_on_the_devices_that_are_here",),
        "a pod's run waits for its hosts when it is sampled from",
    ),
    Mutant(
        "ecdit/sampling/prompts.py",
        "        if np.array_equal(row, null):\n",
        "        if not row.any():\n",
        ("tests/sampling/test_prompts.py::test_a_prompt_of_which_nothing_is_left_is_refused",),
    ),
    Mutant(
        "ecdit/sampling/image_folder.py",
        "        if differing := _differing(found, manifest):\n",
        "        if differing := []:\n",
        ("tests/sampling/test_image_folder.py::test_an_unfinished_folder_is_gone_on_with_by_the_same_call_alone",),
        "images of two calls are mixed",
    ),
    Mutant(
        "ecdit/sampling/image_folder.py",
        '        if found["finished"] and all(',
        '        if found["finished"] or all(',
        ("tests/sampling/test_image_folder.py::test_a_finished_folder_stays_as_it_is_until_an_image_is_damaged",),
        "damaged images of a finished folder stay",
    ),
    Mutant(
        _CHECK,
        "            *tokenizers,\n",
        "",
        (
            "tests/launch/test_folders.py::test_a_job_brings_the_tokenizers_of_the_checkout_and_names_the_folders_that_hosts_read",
        ),
        "workers without a tokenizer end after TPUs were taken",
    ),
    Mutant(
        _TPU_VM,
        "if not options.image and not Path(path).is_absolute()",
        "if options.image and not Path(path).is_absolute()",
        ("tests/launch/test_folders.py::test_workers_without_an_image_refuse_folders_that_would_be_missing_there",),
    ),
)
