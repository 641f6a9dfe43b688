"""Prints the number of JAX devices and the directory of the compilation cache, then sleeps the given seconds."""

import sys
import time

import jax

if __name__ == "__main__":
    time.sleep(float(sys.argv[1]) if sys.argv[1:] else 0)
    print(jax.device_count(), jax.config.jax_compilation_cache_dir)
