"""Trains the mixture of docs/tutorial.md a little: a public model and two specialists of it.

    python -m bam_jax.main --config=configs/tutorial.py --workdir=runs/tutorial

It continues from mixtures/bam, the output of `convert upcycle`, on data/tutorial, the output of
`prepare`. Nothing in it depends on the models' shape: the checkpoint says what it is. 16,384 tokens
show that it works, not how good it gets.
"""

from ml_collections import ConfigDict

import smollm2
from bam_jax import config

DOMAINS = ('general', 'code', 'law')


def get_config() -> ConfigDict:
  """The recipe: one run."""
  mixture = dict(
    label='BAM, KV experts',
    init=dict(checkpoint='mixtures/bam'),
    data=dict.fromkeys(DOMAINS, 1 / len(DOMAINS)),
    tokens=16_384,  # 8 steps
    batch_size=4,
    schedule=dict(peak_learning_rate=2e-4, warmup_steps=2),
    compute=dict(dtype='bfloat16', loss_chunk=512),
    intervals=dict(log=1, checkpoint=8, keep=1),
  )
  recipe = dict(
    name='tutorial',
    seed=0,
    model=smollm2.MODEL,  # required; read by runs from scratch only
    data=dict(path='data/tutorial', sequence_length=512),
    # A run ends by reading all held-out text of these domains: one is enough here.
    evaluation=dict(batch_size=8, domains=('law',)),
    runs=dict(bam=mixture),
  )
  return config.complete(recipe)
