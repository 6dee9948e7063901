"""A real public model upcycled on a laptop: SmolLM2-135M-Instruct, specialists, BTX and BAM.

    python tools/smollm2.py models/smollm2           # the folder of transformers, 538 MB
    python -m bam_jax.convert import-hf --input=models/smollm2 --output=models/seed
    python -m bam_jax.main --config=configs/smollm2.py --workdir=runs/smollm2

The seed is the public model as it is; each specialist continues it on one domain of the sample text
shipped with bam_jax, plus a tenth of general text; the mixtures are trained on the same batches, a
quarter from each domain. A pre-trained model has much to lose and this budget is small, so the
mixtures start where they are good already: routers toward their sources' data, and two FFN experts
a token whose gates are divided by their sum, which is what MixtralForCausalLM computes for BTX.

114 minutes of CPU time, an hour or two on two cores. `:smoke` runs the same graph for a few steps
from a random model of the same shape made small.
"""

from ml_collections import ConfigDict

import paper
from bam_jax import config
from bam_jax.errors import UserError

SEED = 'models/seed'  # the output of `convert import-hf`

MODEL = dict(
  vocab_size=49_152,
  d_model=576,
  num_layers=30,
  num_heads=9,
  num_kv_heads=3,
  head_dim=64,
  ffn_dim=1_536,
  rope_theta=100_000.0,
  norm_epsilon=1e-5,
  block='sequential',
  norm='rmsnorm',
  rotary_layout='half',
)
SCHEDULE = dict(peak_learning_rate=2e-4, warmup_steps=4)
SCALE = paper.Scale(
  model=MODEL,
  sequence_length=512,
  batch_size=4,
  seed_tokens=0,
  seed_schedule=dict(SCHEDULE, peak_learning_rate=4e-4),  # specialists have half of it
  specialist_tokens=65_536,
  mixture_tokens=32_768,
  mixture_schedule=SCHEDULE,
  devices=1,
  grad_accum_steps=1,
  compute=dict(dtype='bfloat16', loss_chunk=512),
  intervals=dict(log=2, checkpoint=16, keep=1),
)


def get_config(argument: str = '') -> ConfigDict:
  """The recipe; `argument` is empty or "smoke"."""
  if argument not in ('', 'smoke'):
    raise UserError(f'configs/smollm2.py has no argument {argument!r}: use none, or smoke.')
  how = dict(router_init='centroids', top_k=2, renormalize=True)
  runs = dict(
    **paper.branches(SCALE),
    btx=paper.mixture(SCALE, 'BTX', 'btx', **how),
    bam_shared_kv=paper.mixture(SCALE, *paper.BAM_SHARED_KV, **how),
    bam_kv=paper.mixture(SCALE, *paper.BAM_KV, **how),
  )
  start = dict(label='SmolLM2-135M-Instruct', init=dict(checkpoint=SEED))
  runs['seed'] |= start | dict(schedule=dict(SCHEDULE, warmup_steps=0))  # it takes no steps
  recipe = paper.recipe('smollm2', SCALE, runs)
  recipe['data'] |= dict(
    path='{workdir}/data', prepare=dict(input='sample', tokenizer=f'{SEED}/tokenizer.json')
  )
  recipe['evaluation'] |= dict(batch_size=8, tokens=4_096)
  if argument:
    recipe['runs']['seed'] |= dict(label='seed', init='scratch')
    recipe = paper.smoke(recipe)
  return config.complete(recipe)
