"""Makes the tests and benchmarks a package, because an installed package is also called `tests`."""
