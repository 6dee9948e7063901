"""What an FFN does between its matrices, and caps.

Legend: E experts, D model, F hidden; a dense FFN has no E.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
  """The arrays of an FFN, or of a device's FFN experts, but for the bias of its output."""

  into: tuple[jax.Array, ...]  # gate and up, EDF; up alone for 'gelu'
  down: jax.Array  # EFD
  biases: tuple[jax.Array, ...] = ()  # EF, of `into`, or none
  ffn: str = dataclasses.field(default='swiglu', metadata={'static': True})

  def biased(
    self, products: Sequence[jax.Array], rows: Callable[[jax.Array], jax.Array] = lambda bias: bias
  ) -> list[jax.Array]:
    """Products with `into`, plus what `rows` makes of their biases."""
    biases = self.biases or [None] * len(products)
    return [x if b is None else x + rows(b) for x, b in zip(products, biases, strict=True)]

  def hidden(self, *products: jax.Array) -> jax.Array:
    """What `down` multiplies, from the products with `into`: SwiGLU, arXiv 2002.05202, or GELU."""
    if self.ffn == 'gelu':
      (up,) = products
      x = up.astype(jnp.promote_types(up.dtype, jnp.float32))
      # Not jax.nn.gelu, whose erfc has no lowering in Pallas for TPU.
      return (x * (1 + jax.lax.erf(x * 0.5**0.5)) / 2).astype(up.dtype)
    gate, up = products
    return (jax.nn.silu(gate) if self.ffn == 'swiglu' else jax.nn.gelu(gate)) * up


def bias_rows(bias_EF: jax.Array, experts_A: jax.Array) -> jax.Array:
  """The bias of each row's expert, (A, F); zeros for expert E, which is none."""
  # As a matmul: the gradient of a look-up would add rows up one at a time.
  return jax.nn.one_hot(experts_A, bias_EF.shape[0], dtype=bias_EF.dtype) @ bias_EF


def capped(x: jax.Array, cap: float) -> jax.Array:
  """`cap tanh(x / cap)`, arXiv 2408.00118; `x` for a cap of 0."""
  return cap * jnp.tanh(x / cap) if cap else x


def derivative(capped_x: jax.Array, cap: float) -> jax.Array:
  """The derivative of `capped` from its result, and 0 for a score that was masked."""
  return 1 - (jnp.maximum(capped_x, -cap) / cap) ** 2
