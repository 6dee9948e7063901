"""BTX and BAM at equal training compute, from no training to three times BTX's budget.

    python -m bam_jax.main --config=configs/budgets.py --workdir=runs/budgets/0
    python -m bam_jax.main --config=configs/budgets.py --config.seed=1 --workdir=runs/budgets/1
    python -m bam_jax.main --config=configs/budgets.py --config.seed=2 --workdir=runs/budgets/2

The quick start's seed and specialists are mixed as BTX, as BAM with soft attention over KV experts,
and as BAM with shared keys and values of which a token visits one attention expert, which costs
what BTX costs. Each starts with the paper's random routers, which read tokens, or with routers that
read the document's latest tokens and were fitted to the specialists' data. A budget is a multiple
of the training FLOPs of the quick start's BTX: a mixture of more FLOPs a token sees fewer tokens.
`:learning_rates` trains each at other peaks with one budget, `:starts` compares the ways to fit
routers, `:vocabulary`, in a separate workdir and after `python -m tools.build_corpus
--output=data/corpus`, has the sizes of configs/reproduction.py's argument of that name, where KV
experts cost little more. `:smoke` runs everything for a few steps. docs/results.md has the results.
"""

from ml_collections import ConfigDict

import paper
import quickstart
import reproduction
from bam_jax import config
from bam_jax.config import strict
from bam_jax.errors import UserError
from bam_jax.model import arithmetic
from bam_jax.upcycle import rules

MIXTURES = {  # name -> label, and keys of config.Upcycle
  'btx': ('BTX', dict(method='btx')),
  'bam_kv': ('BAM, KV experts', dict(method='bam_kv_experts')),
  'bam_top1': ('BAM, shared KV, top-1', dict(method='bam_shared_kv', attention_top_k=1)),
}
STARTS = {'random': {}, 'prefix': quickstart.PREFIX}
FITTED = {'ridge': dict(**quickstart.READ, router_init='ridge', router_scale=8.0)}
BUDGETS = {'0': 0, '1_3': 1 / 3, '1': 1, '3': 3}  # times BTX's
PEAKS = (1e-3, 4e-3)  # of the learning rate, beside the recipes' 2e-3
ARGUMENTS = ('', 'learning_rates', 'starts', 'vocabulary', 'smoke')


def get_config(argument: str = '') -> ConfigDict:
  """The recipe; `argument` is one of ARGUMENTS."""
  if argument not in ARGUMENTS:
    raise UserError(
      f'configs/budgets.py has no argument {argument!r}: use none, or one of '
      f'{", ".join(ARGUMENTS[1:])}.'
    )
  if argument == 'vocabulary':
    recipe = reproduction.get_config(argument).to_dict()
  else:
    recipe = quickstart.get_config('smoke' if argument == 'smoke' else '').to_dict()
  base, runs = recipe['runs']['btx'], {name: recipe['runs'][name] for name in paper.SOURCES}
  starts = FITTED if argument == 'starts' else STARTS
  for name, (label, keys) in MIXTURES.items():
    for start, routers in starts.items():
      upcycle = {'from': paper.SOURCES, **keys, **routers}
      run = base | dict(label=f'{label}, {start} routers', init=dict(upcycle=upcycle))
      if argument == 'learning_rates':
        for peak in PEAKS:
          at_peak = run | dict(schedule=run['schedule'] | dict(peak_learning_rate=peak))
          runs[f'{name}_{start}_peak_{peak:g}'.replace('.', '_')] = at_budget(recipe, at_peak, 1)
      else:
        for budget, times in BUDGETS.items():
          runs[f'{name}_{start}_{budget}'] = at_budget(recipe, run, times)
  return config.complete(recipe | dict(name='budgets', runs=runs))


def at_budget(recipe: dict, run: dict, times: float) -> dict:
  """A mixture with the tokens, in whole steps, that `times` the FLOPs of the recipe's BTX buy."""
  length, btx = recipe['data']['sequence_length'], recipe['runs']['btx']

  def flops(run: dict) -> int:
    upcycle = strict.from_dict(config.Upcycle, run['init']['upcycle'], run['label'])
    model = rules.mixture_model(config.Model(**recipe['model']), upcycle)
    return arithmetic.training_flops(model, length)

  step = run['batch_size'] * length
  tokens = int(times * btx['tokens'] * flops(btx) / flops(run)) // step * step
  warmup = run['schedule']['warmup_steps'] if tokens else 0
  return run | dict(
    label=f"{run['label']}, {times:.3g} of BTX's FLOPs",
    tokens=tokens,
    schedule=run['schedule'] | dict(warmup_steps=warmup),
  )
