"""Launchers: one file for each place where training runs. They import no jax: the machine that launches needs none."""
