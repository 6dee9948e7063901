"""The paper's large scale: a seed of 2B parameters, three specialists, and three mixtures.

    python -m bam_jax.prepare --input=text/ --output=data/bam --tokenizer=tokenizer.json
    python -m bam_jax.main --config=configs/large_2b.py --workdir=runs/large_2b

`text/` has the folders general, code, law and math, `tokenizer.json` at most 256,000 tokens. The
meshes are for 64 TPU v5p chips (4x4x4); set `--config.runs.seed.mesh.fsdp=...` for others. All runs
together need 2.3e22 training FLOPs, 22 days at 40% of those chips' peak. Parameters, FLOPs and
memory of each run, before anything is trained:

    python -m bam_jax.account --config=configs/large_2b.py --against=btx

and `configs/large_2b.py:smoke` is the same graph, tiny, for two CPU cores and about a minute.

The paper's Table 1 is for the small scale (see configs/small_590m.py). Here too, BAM with KV
experts should beat BTX in every domain at equal tokens.
"""

from ml_collections import ConfigDict

import paper
from bam_jax import config
from bam_jax.errors import UserError

SCALE = paper.Scale(
  model=dict(
    vocab_size=256_000,
    d_model=2304,
    num_layers=18,
    num_heads=18,
    num_kv_heads=6,
    head_dim=128,
    ffn_dim=9216,  # the paper's 18432 is the fused gate and up
    tied_embeddings=True,
  ),
  sequence_length=2048,
  batch_size=2048,  # 4M tokens
  seed_tokens=750_000_000_000,
  seed_schedule=dict(peak_learning_rate=1e-2, warmup_steps=2000, min_lr_ratio=0.03),
  specialist_tokens=100_000_000_000,
  # The paper gives 305 TPU-core-days and no tokens. Its 25 core-days at the small scale, for
  # 100B tokens of BTX, tell the speed of a core; at that speed 305 buy 199B tokens here.
  mixture_tokens=200_000_000_000,
  mixture_schedule=dict(peak_learning_rate=1e-4, warmup_steps=1000, min_lr_ratio=0.1),
  devices=64,
  grad_accum_steps=8,  # 4 sequences a device at once
  compute=dict(dtype='bfloat16', remat='none', loss_chunk=8_192),  # 37 of a v5p's 103 GB
  intervals=dict(log=50, evaluate=2_000, checkpoint=1_000),
)


def get_config(argument: str = '') -> ConfigDict:
  """The recipe; `argument` is empty or "smoke"."""
  if argument not in ('', 'smoke'):
    raise UserError(f'configs/large_2b.py has no argument {argument!r}: use none, or smoke.')
  runs = paper.branches(SCALE) | dict(
    btx=paper.btx(SCALE),
    bam_shared_kv=paper.mixture(SCALE, *paper.BAM_SHARED_KV),
    bam_kv=paper.mixture(SCALE, *paper.BAM_KV),
  )
  recipe = paper.recipe('large_2b', SCALE, runs)
  return config.complete(paper.smoke(recipe) if argument else recipe)
