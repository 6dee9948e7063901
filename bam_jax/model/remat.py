"""What the backward pass finds saved of a block, and what it computes again."""

from collections.abc import Callable

import jax

# Names that the block gives to its intermediate results.
TOKENS = 'tokens'  # the residual stream of the whole group
QUERY, KEY_VALUE, HEADS = 'query', 'key_value', 'heads'  # of attention
HIDDEN = 'hidden'  # the two products that SwiGLU multiplies

SAVED = {
  'matmuls': (TOKENS, QUERY, KEY_VALUE, HEADS, HIDDEN),
  'attention': (TOKENS, QUERY, KEY_VALUE, HEADS),
  'full': (),
}


def wrap(name: str, gathers: bool) -> Callable[[Callable], Callable]:
  """The decorator of a block's function, for a value of `Compute.remat`.

  Args:
    name: 'none' saves everything; 'matmuls' all that takes a matmul to compute; 'attention' that of
      attention, and computes the FFN's hidden activations again; 'full' nothing.
    gathers: whether the block gathers its weights over devices. They are never saved, and 'none' is
      then 'matmuls'.
  """
  if name == 'none' and not gathers:
    return lambda function: function
  names = SAVED['matmuls' if name == 'none' else name]
  save = jax.checkpoint_policies.save_only_these_names(*names)
  # Inside a scan there is nothing that XLA could merge the two computations with.
  return lambda function: jax.checkpoint(function, policy=save, prevent_cse=False)
