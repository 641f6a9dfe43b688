"""Estimates the calibrator's step like a plan: `python -m tests.planning.calibrate`, ten minutes on two cores.

It prints the estimate for the language model of decoder.py on a v5p-128, for which a measurement is published.
"""

from ecdit.planning.compiler import find_target, make_torus, target_devices, use_compiler
from ecdit.planning.estimate import Estimate, Estimator
from ecdit.planning.hlo import parse
from ecdit.runtime import TpuOptions
from ecdit.tuned.compiler_options import TPU_OPTIONS
from tests.planning import decoder

TARGET = "v5p:4x4x4"


def main() -> None:
    """Prints a line for each set of compiler options."""
    use_compiler()
    target = find_target(TARGET)
    devices = target_devices(target)
    ours = TpuOptions(**TPU_OPTIONS).of("v5p")
    print(f"measured and published: {decoder.MEASURED_MFU:.1%}")
    for name, options in (
        ("options as published", decoder.COMPILER_OPTIONS),
        ("with those of the paper's recipe", {**decoder.COMPILER_OPTIONS, **ours}),
    ):
        found = estimate(devices, target, options)
        flops = decoder.model_flops(len(devices)) / len(devices) / target.chip.peak_flops
        print(
            f"{name}: {found.seconds:.3f} s, MFU {flops / found.seconds:.1%} (compute {found.compute_seconds:.3f} s, "
            f"communication {found.communication_seconds:.3f} s, of which exposed {found.exposed_seconds:.3f} s)",
            flush=True,
        )


def estimate(devices, target, options) -> Estimate:
    """Of the decoder's step."""
    compiled = decoder.compile_decoder(devices, compiler_options=options)
    mesh = decoder.make_mesh(devices)
    return Estimator(parse(compiled.as_text()), make_torus(mesh, target.chip)).estimate


if __name__ == "__main__":
    main()
