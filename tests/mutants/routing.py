"""Mutants of the routing rules."""

from tests.mutants.mutant import Mutant

_FILE = "ecdit/models/routing.py"

MUTANTS = (
    Mutant(
        _FILE,
        "affinity = jax.nn.softmax(router_logits.astype(jnp.float32), axis=-1)  # over E",
        "affinity = jax.nn.softmax(router_logits.astype(jnp.float32), axis=1)  # over E",
        ("tests/models/test_routing.py",),
    ),
)
