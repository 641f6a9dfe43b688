"""The loop over steps. It knows neither model nor data: it is given a step, batches, and what to call between steps."""

import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from ecdit.exit_codes import INTERRUPTED
from ecdit.training.config import Phase
from ecdit.training.state import TrainState
from ecdit.training.step import Batch, Metrics


@dataclasses.dataclass(frozen=True)
class Hooks:
    """The functions that the loop calls besides the step. All processes make the same calls in the same order."""

    enter: Callable[[Phase, str], None]  # announces the run's next activity
    before_step: Callable[[int, TrainState], None]
    report: Callable[[int, Metrics, float], None]  # gets (step, its metrics, seconds of waiting for its batch)
    draws: Callable[[int], bool]  # returns whether to draw images after this step
    draw: Callable[[int, TrainState], None]
    saves: Callable[[int], bool]  # returns whether to save this step
    save: Callable[[int, TrainState], None]  # may return before the save has ended
    after_step: Callable[[int], None]
    finish: Callable[[int], None]  # waits until the save of this step has ended
    stop_requested: Callable[[int], bool]  # called once per step; True ends the loop after a save


def run_steps(
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    state: TrainState,
    batches: Iterator[Batch],
    last_step: int,
    hooks: Hooks,
) -> tuple[TrainState, bool]:
    """Trains from `state` to `last_step`, or until a stop is requested.

    The metrics of a step are read once the next one is dispatched, so that the device never waits for the host.
    Everything that a checkpoint must find done (metrics, images) is done before its save begins.

    Returns the state, and whether a stop was requested.
    """
    done = int(state.step)
    pending: tuple[int, Metrics, float] | None = None
    stop = False
    for step in range(done + 1, last_step + 1):
        hooks.before_step(step, state)
        hooks.enter("data", f"waiting for the data of step {step}")
        start = time.perf_counter()
        batch = next(batches)
        data_seconds = time.perf_counter() - start
        # The first step's metrics are read in the second, which may also compile, because the arrays' layout changed.
        hooks.enter("compile" if step <= done + 2 else "step", f"in step {step}")
        state, metrics = train_step(state, batch)
        if pending is not None:
            hooks.report(*pending)
        pending = (step, metrics, data_seconds)
        stop = hooks.stop_requested(step)
        draw, save = hooks.draws(step) and not stop, hooks.saves(step) or stop
        if draw or save or step == last_step:
            hooks.report(*pending)
            pending = None
        if draw:  # before the next step takes the state's memory
            hooks.enter("draw", f"drawing the images of step {step}")
            hooks.draw(step, state)
        if save:
            hooks.enter("save", f"saving step {step}")
            hooks.save(step, state)
        hooks.after_step(step)
        if stop:
            break
    hooks.enter("save", f"waiting for the save of step {int(state.step)}")
    hooks.finish(int(state.step))
    return state, stop


class StopRequests:
    """Agrees between all processes that the run was asked to stop, by SIGTERM or Ctrl-C (SIGINT).

    The first Ctrl-C lets the run save and end, a second one ends the process at once. Python runs signal handlers only
    between steps of its own, and a compilation takes minutes; so a thread reads the signals' numbers from a pipe.
    """

    def __init__(self) -> None:
        self.signalled = self.interrupted = False
        one = jax.process_count() == 1
        # With several processes Orbax makes them agree on a step; with one process it ignores the signal.
        self.previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, self._on_sigterm)} if one else {}
        self.previous[signal.SIGINT] = signal.signal(signal.SIGINT, _ignore)
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.wakeup = signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self._watch, name="stop-requests", daemon=True)
        self.thread.start()

    def reached(self, step: int) -> bool:
        """Returns True from the step on at which all processes stop; every process asks at every step."""
        return self.signalled if jax.process_count() == 1 else ocp.multihost.reached_preemption(step)

    def close(self) -> None:
        """Restores the previous handlers."""
        signal.set_wakeup_fd(self.wakeup)
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        os.write(self.write_end, b"\0")
        self.thread.join()
        os.close(self.read_end)
        os.close(self.write_end)

    def _on_sigterm(self, *_: Any) -> None:
        self.signalled = True

    def _watch(self) -> None:
        while number := os.read(self.read_end, 1)[0]:
            if number != signal.SIGINT:
                continue
            if self.interrupted:
                print("interrupted twice: ended without a save", file=sys.stderr, flush=True)
                os._exit(INTERRUPTED)
            self.interrupted = self.signalled = True
            if signal.SIGTERM not in self.previous:  # the processes agree to stop by SIGTERM
                os.kill(os.getpid(), signal.SIGTERM)


def _ignore(*_: Any) -> None:
    """Does nothing: a signal needs a handler to be written to the pipe."""
