"""A product whose backward pass reads what a remat policy saved, without rounding it once more."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

KernelGradient = Callable[[Array, Array], tuple[Array, Array]]


# Type checkers take its result for an object: jax's stubs do not follow a custom_vjp through `functools.partial`.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def saved_product(
    x: Array, saved: Array, kernel: Array, forms: tuple[str, str], kernel_gradient: KernelGradient
) -> Array:
    """Returns the product of x and kernel, whose kernel's gradient uses what remat policies save of x.

    The product itself reads x, not the saved copy: `jax.checkpoint` rounds a saved activation once more wherever it is
    also used, and after a kernel or an all-to-all that rounding is a separate pass on a TPU.

    Args:
      x: an activation.
      saved: x, `named` where a policy is to save it; it gets no gradient.
      kernel: the matrix, or one for each expert.
      forms: two forms of `jnp.einsum`: of the product, and of x's gradient from the product's gradient and the kernel.
      kernel_gradient: maps x and the product's gradient to the kernel's gradient and the product's gradient again, from
        which x's gradient is computed; so it can say which of the two comes first.
    """
    return jnp.einsum(forms[0], x, kernel)


def _product_saving(
    x: Array, saved: Array, kernel: Array, forms: tuple[str, str], kernel_gradient: KernelGradient
) -> tuple[Array, tuple[Array, Array]]:
    return jnp.einsum(forms[0], x, kernel), (saved, kernel)


def _product_gradients(
    forms: tuple[str, str], kernel_gradient: KernelGradient, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array, Array]:
    saved, kernel = residuals
    of_kernel, gradient = kernel_gradient(saved, gradient)
    return jnp.einsum(forms[1], gradient, kernel), jnp.zeros_like(saved), of_kernel


saved_product.defvjp(_product_saving, _product_gradients)
