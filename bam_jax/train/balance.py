"""Balancing experts over the whole batch of a step: loads beforehand, and a bias afterwards."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from bam_jax import config
from bam_jax.model import block, transformer
from bam_jax.train import stages as stages_lib

BIAS = 'blocks/ffn/expert_bias'


def whole_step(network: transformer.Network, loss: config.Loss) -> Callable:
  """What a step's micro-batches balance over: (params, micro-batches) -> Routing or None.

  Micro-batch by micro-batch, experts of domains are punished for what is their purpose; arXiv
  2501.11873. The statistics of the whole step need a forward pass over all of its micro-batches
  before the first gradient: a third more work in the blocks, and no more memory.
  """
  if loss.balance_over == 'micro_batch' or network.model == network.model.dense():
    return lambda params, micro: None

  def run(params, micro) -> block.Routing:
    def body(carry, part):
      inputs = part['tokens'], part['segments'], part['positions']
      return carry, network.hidden(params, *inputs)[1]

    _, routing = jax.lax.scan(body, None, micro)
    return network.layout.total(jax.tree.map(lambda x: x.sum(0), routing))

  return run


def bias_update(
  model: config.Model, loss: config.Loss, stages: stages_lib.Stages
) -> Callable[[dict, block.Routing], dict]:
  """The function (params, routing of the step) -> params, after the optimizer has had its turn.

  `b_i += rate * sign(mean load - load_i)`, a layer at a time; arXiv 2408.15664, algorithm 1.
  """
  experts = model.ffn_experts
  rate = loss.expert_bias_update_rate * stages_lib.factor(BIAS, stages.factors)
  if experts is None or not experts.expert_bias or not rate:
    return lambda params, routing: params

  def run(params, routing):
    # In whole numbers, so that equal loads move nothing: `mean - load` has the sign of the floor of
    # the mean minus the load, and where these two are equal, of what the floor leaves out.
    load_LE = routing.ffn.load
    floor_L1, rest_L1 = jnp.divmod(load_LE.sum(-1, keepdims=True), experts.num_experts)
    sign_LE = jnp.sign(2 * (floor_L1 - load_LE) + (rest_L1 > 0))
    ffn = params['blocks']['ffn']
    bias_LE = ffn['expert_bias'] + rate * sign_LE
    return params | {'blocks': params['blocks'] | {'ffn': ffn | {'expert_bias': bias_LE}}}

  return run
