"""Lists the backends. Each is one file here, which implements `protocol.Backend`, and one entry of BACKENDS.

Backends do not import JAX, because `launch.status` and `launch.stop` import all of them.
"""

from launch.backends import jobset, local, tpu_vm
from launch.backends.protocol import Backend

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (jobset.JobSet(), tpu_vm.TpuVm(), local.LocalProcesses())
}
