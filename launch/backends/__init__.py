"""The table of backends: each is one file here, which implements `protocol.Backend`, and one entry of BACKENDS.

`launch.status` and `launch.stop` import all of them, so a backend imports no JAX.
"""

from launch.backends import jobset, local, tpu_vm
from launch.backends.protocol import Backend

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (jobset.JobSet(), tpu_vm.TpuVm(), local.LocalProcesses())
}
