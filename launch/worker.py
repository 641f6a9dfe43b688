"""Writes the bash script and the systemd unit that restart training on a TPU VM after failures and reboots.

The script restarts training after each of RESTART_CODES. The unit starts the script, also after a reboot of the VM,
unless the run has ended.
"""

from collections.abc import Sequence

from launch.job import RESTART_CODES
from launch.values import bash_array

DIRECTORY = "ecdit-run"  # on a worker, in its home directory
UNIT = "ecdit-run.service"
SECRETS = "secrets"  # lines of NAME=VALUE, mode 0600
ENDED = "ended"  # a file that marks a run that must not start again
RESTART_PAUSE_SECONDS = 10  # time for the other hosts to end
# Only the script gets SIGTERM (KillMode=mixed), passes it on, and may take as long as a save. Chips lock their buffers
# in memory.
UNIT_TEXT = f"""[Unit]
Description=Training of EC-DIT
Wants=network-online.target
After=network-online.target
ConditionPathExists=!@DIRECTORY@/{ENDED}

[Service]
User=@USER@
WorkingDirectory=@DIRECTORY@
ExecStart=/bin/bash run.sh
StandardOutput=append:@DIRECTORY@/log
StandardError=inherit
KillMode=mixed
TimeoutStopSec=infinity
LimitMEMLOCK=infinity
LimitNOFILE=1048576

[Install]
WantedBy=multi-user.target
"""
STOP_COMMAND = f"sudo systemctl disable --now {UNIT}"  # waits for the save
REFUSE_RUNNING = (
    f"if systemctl is-active --quiet {UNIT}; then echo training runs already; exit 1; fi; rm -f {DIRECTORY}/{ENDED}"
)
_READ_SECRETS = f'while IFS= read -r line; do export "$line"; done < {SECRETS}\n'  # no line is evaluated


def start_command(as_root: bool) -> str:
    """Returns the shell command that starts the unit, now and at every boot, as root or as the current user.

    A container needs root, because the script could not pass SIGTERM to a `sudo docker` that the user started.
    """
    user = "root" if as_root else "$(id -un)"
    return (  # sed inserts user and directory, for which systemd has no variables
        f'cd {DIRECTORY} && sed -e "s|@USER@|{user}|; s|@DIRECTORY@|$PWD|" {UNIT} > installed.service '
        f"&& sudo install -m 644 installed.service /etc/systemd/system/{UNIT} "
        f"&& sudo systemctl daemon-reload && sudo systemctl enable --now {UNIT}"
    )


def restart_loop(command: Sequence[str], max_restarts: int, secrets: bool = False) -> str:
    """Returns the script of a worker, which restarts `command` after each of RESTART_CODES, until SIGTERM.

    Args:
      command: program and arguments, which the shell does not interpret.
      max_restarts: the largest number of restarts.
      secrets: whether to set the variables in the file SECRETS for it.
    """
    codes = " || ".join(f"(code >= {first} && code <= {last})" for first, last in _ranges(RESTART_CODES))
    return f"""#!/usr/bin/env bash
# Trains on this worker. SIGTERM is passed on, so that training saves, and ends the loop.
{bash_array("command", command)}
{_READ_SECRETS if secrets else ""}echo "runs ${{command[*]@Q}}"
stopped=0 restarts=0 child=
trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM
while (( ! stopped )); do
  "${{command[@]}}" &
  child=$!
  (( ! stopped )) || kill -TERM "$child" 2>/dev/null  # SIGTERM came before the trap knew the child
  wait "$child"; code=$?
  # SIGTERM interrupts wait: the child is still saving.
  while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
  if (( stopped )); then echo "stopped, exit code $code"; exit "$code"; fi
  if ! (( {codes} )) || (( restarts >= {max_restarts} )); then
    touch {ENDED}
    echo "ended, exit code $code"
    exit "$code"
  fi
  restarts=$(( restarts + 1 ))
  echo "exit code $code: restart $restarts of at most {max_restarts}"
  sleep {RESTART_PAUSE_SECONDS}
done
"""


def _ranges(codes: Sequence[int]) -> list[tuple[int, int]]:
    """Returns ascending codes as ranges, (first, last)."""
    ranges: list[tuple[int, int]] = []
    for code in codes:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1] = (ranges[-1][0], code)
        else:
            ranges.append((code, code))
    return ranges
