"""BAM in minutes on two CPU cores: branch, attend, mix, on the sample text shipped with bam_jax.

    python -m bam_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

A seed is trained on mixed text that is mostly general. Three copies of it continue on one domain
each, plus a tenth of general text, at half the seed's learning rate. The seed and the specialists
are then mixed, and the mixtures are trained on the same batches, a quarter from each domain: BTX
(FFN experts, averaged attention), BAM, whose attention experts have their own keys and values, and
BAM that costs what BTX costs: keys and values are shared, and a token visits one attention expert,
chosen by its document's latest tokens. One more is not trained, and keeps its sources'
embeddings. `:smoke` runs it all for a few steps.

Ten minutes on two cores of a 2026 server (`make quickstart`). Average held-out perplexity over the
four domains: seed 48.2, BTX 38.3, BAM with KV experts 35.8, with one attention expert a token 36.4,
not trained 37.9.
"""

from ml_collections import ConfigDict

from bam_jax import config
from bam_jax.errors import UserError

SPECIALTIES = ('code', 'law', 'math')
# Routers that read the latest tokens of the document, and point to the specialists' data before any
# training.
READ = dict(router_input='prefix', router_memory=16)
PREFIX = dict(**READ, router_init='centroids', router_scale=4.0)
READY = dict(**READ, attention_top_k=1, renormalize=True, router_init='ridge', embedding_rank=16)


def get_config(argument: str = '') -> ConfigDict:
  """The recipe; `argument` is empty or "smoke"."""
  if argument not in ('', 'smoke'):
    raise UserError(f'configs/quickstart.py has no argument {argument!r}: use none, or smoke.')
  recipe = dict(
    name='quickstart',
    seed=0,
    steps=4 if argument else 0,
    data=dict(
      path='{workdir}/data',
      sequence_length=128,
      prepare=dict(input='sample', train_tokenizer=2048),
    ),
    model=dict(
      vocab_size=2048,
      d_model=128,
      num_layers=4,
      num_heads=4,
      num_kv_heads=2,
      head_dim=32,
      ffn_dim=384,
      tied_embeddings=True,
    ),
    evaluation=dict(batch_size=32, tokens=4_096, domains=('general', *SPECIALTIES)),
    runs=dict(
      seed=seed(),
      code=specialist('code'),
      law=specialist('law'),
      math=specialist('math'),
      btx=mixture('BTX', 'btx'),
      bam_kv=mixture('BAM, KV experts', 'bam_kv_experts'),
      bam_top1=mixture('BAM, shared KV, top-1', 'bam_shared_kv', attention_top_k=1, **PREFIX),
      untrained=mixture('BAM, untrained', 'bam_kv_experts', **READY)
      | dict(tokens=0, schedule=dict(peak_learning_rate=2e-3, warmup_steps=0)),
    ),
  )
  return config.complete(recipe)


def seed() -> dict:
  """The dense model that everything starts from."""
  return dict(
    label='seed',
    init='scratch',
    data=dict(general=0.52, code=0.16, law=0.16, math=0.16),
    tokens=1_400_000,
    schedule=dict(peak_learning_rate=4e-3, warmup_steps=40),
    **common(),
  )


def specialist(domain: str) -> dict:
  """Branch: the seed continues on one domain and a tenth of general text."""
  return dict(
    label=f'{domain} specialist',
    init=dict(run='seed'),
    data={domain: 0.9, 'general': 0.1},
    data_seed=1,
    tokens=500_000,
    schedule=dict(peak_learning_rate=2e-3, warmup_steps=20),
    **common(),
  )


def mixture(label: str, method: str, **upcycle) -> dict:
  """Mix: the seed and the three specialists in one model; equal data for every method."""
  return dict(
    label=label,
    init=dict(upcycle={'from': ('seed', *SPECIALTIES), 'method': method, **upcycle}),
    data=dict(general=0.25, code=0.25, law=0.25, math=0.25),
    data_seed=2,
    tokens=750_000,
    schedule=dict(peak_learning_rate=2e-3, warmup_steps=20),
    **common(),
  )


def common() -> dict:
  """4,096 tokens a step; logs every 5 steps, evaluates and saves every 50."""
  return dict(
    batch_size=32, compute=dict(unroll=4), intervals=dict(log=5, evaluate=50, checkpoint=50)
  )
