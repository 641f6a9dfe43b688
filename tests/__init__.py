"""The code of the tests and benchmarks: a package, because an installed one is called `tests` too."""
