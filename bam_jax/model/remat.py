"""Which of a block's intermediate results the backward pass finds saved; all else is recomputed."""

from collections.abc import Callable

import jax

from bam_jax.parallel.collectives import TOKENS, WEIGHTS

# Names that the block gives to its intermediate results with `checkpoint_name`. WEIGHTS are a
# layer's, gathered from several devices; TOKENS the residual stream of an `expert` group.
QUERY, KEY_VALUE, HEADS = 'query', 'key_value', 'heads'  # of attention
HIDDEN = 'hidden'  # the two products that SwiGLU multiplies
EXPERT_OUTPUTS = 'expert_outputs'  # of the FFN experts, before the gates

SAVED = {
  'none': (WEIGHTS, TOKENS, QUERY, KEY_VALUE, HEADS, HIDDEN, EXPERT_OUTPUTS),
  'matmuls': (TOKENS, QUERY, KEY_VALUE, HEADS, HIDDEN, EXPERT_OUTPUTS),
  'attention': (TOKENS, QUERY, KEY_VALUE, HEADS),
  'full': (),
}


def checkpoint(layer: Callable, remat: str) -> Callable:
  """`layer` with a backward pass that finds `SAVED[remat]` and recomputes the rest.

  Args:
    layer: the body of a scan.
    remat: 'none' saves everything that is not elementwise; 'matmuls' whatever takes a matmul to
      compute, and gathers weights again; 'attention' what attention computes, and recomputes the
      FFN's hidden activations; 'full' nothing.
  """
  policy = jax.checkpoint_policies.save_only_these_names(*SAVED[remat])
  # In a scan there is nothing that XLA could merge the two computations with.
  return jax.checkpoint(layer, policy=policy, prevent_cse=False)
