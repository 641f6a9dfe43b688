"""Sets fast compilation for tests, which compile much and run little. Imports no JAX, which would read its flags."""

import importlib.metadata

# LLVM's optimisations would take most of the suite's time.
QUICK_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # The newer emitters take twice the time to compile a train step. Later versions have no others and refuse the flag.
    QUICK_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
