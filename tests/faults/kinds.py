"""All kinds of faults by name, in the order of a campaign's table."""

from collections.abc import Callable

from tests.faults import faults, guards, io_errors
from tests.faults.trial import Trial

KINDS: dict[str, Callable[[Trial], None]] = {
    "kill": faults.kill,
    "kill in a save": faults.kill_in_a_save,
    "kill at a phase boundary": guards.kill_at_a_boundary,
    "kill one of two": faults.kill_one_of_two,
    "hang": faults.hang,
    "SIGTERM": faults.sigterm,
    "SIGTERM to one of two": faults.sigterm_to_one_of_two,
    "bit flip": faults.bit_flip,
    "truncation": faults.truncation,
    "damage met by two": faults.damage_met_by_two,
    "vanished checkpoints": guards.vanished_checkpoints,
    "garbled metrics": guards.garbled_metrics,
    "full disk": faults.full_disk,
    "errors of reading": io_errors.errors_of_reading,
    "errors of writing": io_errors.errors_of_writing,
    "second trainer": guards.second_trainer,
    "differing hosts": guards.differing_hosts,
    "processes changed": faults.processes_changed,
}
