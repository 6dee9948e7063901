"""What the backward pass finds saved of a block, and what it computes again."""

from collections.abc import Callable

import jax

# Names that the block gives to its intermediate results.
WEIGHTS = 'weights'  # a layer's, gathered from the devices that hold parts of them
TOKENS = 'tokens'  # the residual stream of the whole group
QUERY, KEY_VALUE, HEADS = 'query', 'key_value', 'heads'  # of attention
HIDDEN = 'hidden'  # the two products that SwiGLU multiplies
CHOICES = 'choices'  # what the FFN experts of each token made, before the gates

SAVED = {
  'none': (WEIGHTS, TOKENS, QUERY, KEY_VALUE, HEADS, HIDDEN, CHOICES),
  'matmuls': (TOKENS, QUERY, KEY_VALUE, HEADS, HIDDEN, CHOICES),
  'attention': (TOKENS, QUERY, KEY_VALUE, HEADS),
  'full': (),
}


def wrap(name: str, gathers: bool) -> Callable[[Callable], Callable]:
  """The decorator of a block's function, for a value of `Compute.remat`.

  Args:
    name: 'none' saves everything that is not elementwise; 'matmuls' all that takes a matmul to
      compute, and gathers weights again; 'attention' that of attention, and computes the FFN's
      hidden activations again; 'full' nothing.
    gathers: whether the block gathers its weights over devices. Where it does not, 'none' saves
      what is elementwise as well: that costs memory that such a model has.
  """
  if name == 'none' and not gathers:
    return lambda function: function
  save = jax.checkpoint_policies.save_only_these_names(*SAVED[name])
  # Inside a scan there is nothing that XLA could merge the two computations with.
  return lambda function: jax.checkpoint(function, policy=save, prevent_cse=False)
