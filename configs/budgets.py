"""BTX and BAM at equal training compute, from no training to three times the quick start's budget.

    python -m bam_jax.main --config=configs/budgets.py --workdir=runs/budgets/0
    python -m bam_jax.main --config=configs/budgets.py --config.seed=1 --workdir=runs/budgets/1
    python -m bam_jax.main --config=configs/budgets.py --config.seed=2 --workdir=runs/budgets/2

The quick start's seed and specialists are mixed as BTX, as BAM with soft attention over KV experts,
and as BAM with shared keys and values of which a token visits one attention expert, which costs
what BTX costs. Each starts with the paper's random routers, which read tokens, or with routers that
read the document so far and were fitted to the specialists' data. A budget is a multiple of the
training FLOPs of the quick start's BTX: a mixture of more FLOPs a token sees fewer tokens. `:smoke`
runs everything for a few steps.
"""

from ml_collections import ConfigDict

import quickstart
from bam_jax import config
from bam_jax.config import strict
from bam_jax.model import arithmetic
from bam_jax.upcycle import rules

MIXTURES = {  # name -> label, method, and keys of config.Upcycle
  'btx': ('BTX', 'btx', {}),
  'bam_kv': ('BAM, KV experts', 'bam_kv_experts', {}),
  'bam_top1': ('BAM, shared KV, top-1', 'bam_shared_kv', {'attention_top_k': 1}),
}
STARTS = {'random': {}, 'prefix': quickstart.PREFIX}
BUDGETS = {'0': 0, '1_3': 1 / 3, '1': 1, '3': 3}  # times BTX's


def get_config(argument: str = '') -> ConfigDict:
  """The recipe; `argument` is empty or "smoke"."""
  recipe = quickstart.get_config(argument).to_dict()
  model, length = config.Model(**recipe['model']), recipe['data']['sequence_length']
  sources = ('seed', *quickstart.SPECIALTIES)
  runs = {name: recipe['runs'][name] for name in sources}
  for name, (label, method, keys) in MIXTURES.items():
    for start, routers in STARTS.items():
      run = quickstart.mixture(f'{label}, {start} routers', method, **keys, **routers)
      upcycle = strict.from_dict(config.Upcycle, run['init']['upcycle'], name)
      flops = arithmetic.training_flops(rules.mixture_model(model, upcycle), length)
      for budget, times in BUDGETS.items():
        runs[f'{name}_{start}_{budget}'] = run | at_budget(run, times, flops, model, length)
  return config.complete(recipe | dict(name='budgets', runs=runs))


def at_budget(run: dict, times: float, flops: int, model: config.Model, length: int) -> dict:
  """Tokens of a mixture of so many FLOPs a token, in whole steps, and a schedule for them."""
  btx = strict.from_dict(config.Upcycle, quickstart.mixture('', 'btx')['init']['upcycle'], 'btx')
  of_btx = arithmetic.training_flops(rules.mixture_model(model, btx), length)
  step = run['batch_size'] * length
  tokens = int(times * run['tokens'] * of_btx / flops) // step * step
  warmup = run['schedule']['warmup_steps'] if tokens else 0
  return dict(
    label=f"{run['label']}, {times:.3g} of BTX's FLOPs",
    tokens=tokens,
    schedule=run['schedule'] | dict(warmup_steps=warmup),
  )
