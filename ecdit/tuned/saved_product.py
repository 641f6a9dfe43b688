"""Computes a product whose backward pass reads an activation saved by a remat policy, without rounding it again."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

KernelGradient = Callable[[Array, Array], tuple[Array, Array]]


# Type checkers infer `object` for its result, because jax's stubs do not follow a custom_vjp through `partial`.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def saved_product(
    x: Array, saved: Array, kernel: Array, forms: tuple[str, str], kernel_gradient: KernelGradient
) -> Array:
    """Returns the product of x and kernel. The kernel's gradient uses the saved copy of x.

    The product itself reads x and not the copy, because `jax.checkpoint` rounds a saved activation again wherever it is
    also used. After a kernel or an all-to-all, that rounding is a separate pass on a TPU.

    Args:
      x: an activation.
      saved: x, `named` for remat policies; it gets no gradient.
      kernel: the matrix, or one for each expert.
      forms: two forms of `jnp.einsum`: of the product, and of x's gradient from the product's gradient and the kernel.
      kernel_gradient: maps x and the product's gradient to the kernel's gradient and the product's gradient. x's
        gradient is computed from the latter, so that the function can order the two computations.
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
