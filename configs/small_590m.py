"""The paper's small scale: a seed of 590M parameters, three specialists, and three mixtures.

    python -m bam_jax.prepare --input=text/ --output=data/bam --tokenizer=tokenizer.json
    python -m bam_jax.main --config=configs/small_590m.py --workdir=runs/small_590m

`text/` has the folders general, code, law and math, `tokenizer.json` at most 256,000 tokens. The
meshes are for 16 TPU v5e chips (4x4); set `--config.runs.seed.mesh.fsdp=...` for others. All runs
together need 2.1e21 training FLOPs, 20 days at 40% of those chips' peak. Parameters, FLOPs and
memory of each run, before anything is trained:

    python -m bam_jax.account --config=configs/small_590m.py --against=btx

and `configs/small_590m.py:smoke` is the same graph, tiny, for two CPU cores and about a minute. The
mixtures read equal tokens (the paper's data-matched regime); configs/ablations.py:cm has them at
BTX's compute.

The paper's results on its own data, held-out perplexity, Table 1:

                          general   code    law   math
    seed                    23.98   8.62   8.92  14.12
    specialist, own domain      -   3.71   7.53   5.67
    BTX                     26.72   3.78   6.63   5.77
    BAM, shared KV          25.67   3.64   6.39   5.57
    BAM, KV experts         24.02   3.45   6.04   5.31
"""

from ml_collections import ConfigDict

import paper
from bam_jax import config
from bam_jax.errors import UserError

SCALE = paper.Scale(
  model=dict(
    vocab_size=256_000,
    d_model=1024,
    num_layers=6,
    num_heads=8,
    num_kv_heads=8,
    head_dim=128,
    ffn_dim=2048,  # the paper's 4096 is the fused gate and up
    tied_embeddings=False,
  ),
  sequence_length=2048,
  batch_size=512,  # 1M tokens
  seed_tokens=400_000_000_000,
  seed_schedule=dict(peak_learning_rate=1.2e-4, warmup_steps=1500, min_lr_ratio=0.1),
  specialist_tokens=100_000_000_000,
  mixture_tokens=100_000_000_000,
  mixture_schedule=dict(peak_learning_rate=1.2e-4, warmup_steps=1500, min_lr_ratio=0.1),
  devices=16,
  grad_accum_steps=8,  # 4 sequences a device at once
  compute=dict(dtype='bfloat16', remat='full', loss_chunk=8_192),
  intervals=dict(log=50, evaluate=2_000, checkpoint=1_000),
)


def get_config(argument: str = '') -> ConfigDict:
  """The recipe; `argument` is empty or "smoke"."""
  if argument not in ('', 'smoke'):
    raise UserError(f'configs/small_590m.py has no argument {argument!r}: use none, or smoke.')
  runs = paper.branches(SCALE) | dict(
    btx=paper.btx(SCALE),
    bam_shared_kv=paper.mixture(SCALE, *paper.BAM_SHARED_KV),
    bam_kv=paper.mixture(SCALE, *paper.BAM_KV),
  )
  recipe = paper.recipe('small_590m', SCALE, runs)
  return config.complete(paper.smoke(recipe) if argument else recipe)
