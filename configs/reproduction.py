"""The paper's comparison at small scale: does BAM beat BTX at equal data and at equal compute?

    python -m tools.build_corpus --output=data/corpus
    python -m bam_jax.main --config=configs/reproduction.py --workdir=runs/r_0
    python -m bam_jax.main --config=configs/reproduction.py --config.seed=1 --workdir=runs/r_1
    python -m bam_jax.main --config=configs/reproduction.py --config.seed=2 --workdir=runs/r_2

A seed is trained on text that is mostly general, three specialists continue it on nine tenths of
their own domain, and every mixture is trained on a quarter of each domain, all on the same batches
in the same order. Shapes keep the paper's proportions at its small scale: as many KV heads as
heads, an FFN width of twice the model's, untied embeddings. `:main` is the comparison of the
paper's first table; without an argument, the ablations are included. `:learning_rates` trains BTX
and BAM at other peaks, the same for both; `:starts` gives them sharper gates at the start, and a
shorter warm-up; `:budgets` varies the number of tokens in both regimes; `:vocabulary`, in a
separate workdir, uses models whose FLOPs are mostly the output embedding's, as in the paper;
`:smoke` runs everything for a few steps. docs/results.md has the results.
"""

import dataclasses

from ml_collections import ConfigDict

import paper
from bam_jax import config
from bam_jax.errors import UserError

SCALE = paper.Scale(
  model=dict(
    vocab_size=4096,
    d_model=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    ffn_dim=256,
    tied_embeddings=False,
  ),
  sequence_length=128,
  batch_size=16,
  seed_tokens=4_000_000,
  seed_schedule=dict(peak_learning_rate=4e-3, warmup_steps=100, min_lr_ratio=0.1),
  specialist_tokens=1_000_000,
  mixture_tokens=1_000_000,
  mixture_schedule=dict(peak_learning_rate=2e-3, warmup_steps=50, min_lr_ratio=0.1),
  devices=1,
  grad_accum_steps=1,
  compute=dict(unroll=4),
  intervals=dict(log=10, evaluate=200, checkpoint=200, keep=1),
)
# KV experts need 1.35 times BTX's FLOPs a token here, 1.34 in the paper's 590M, and 1.79 above.
VOCABULARY = dataclasses.replace(SCALE, model=SCALE.model | dict(num_layers=2, vocab_size=8192))
PEAKS = (5e-4, 1e-3, 2e-3, 4e-3)  # of mixtures: the chosen one, and others
SWEPT = ('btx', 'bam_kv', 'bam_kv_cm')
MORE_EXPERTS = (5, 6, 7, 8)  # of BTX, top 1
STARTED = ('btx', 'bam_kv_cm')
STARTS = dict(
  sharp='sharp gates',
  right='routers toward their data',
  soon='short warm-up',
  fast='fast routers',
)
SHARP = 4.0  # of the routers' first weights: most of a gate is one expert's
FAST = 4.0  # times the learning rate of all else, for routers
SOON = 10  # steps of warm-up, a fiftieth of BTX's: in the paper it is about a sixtieth
LONG = 3  # times the mixtures' budget
COMPARED = ('btx', 'bam_kv', 'bam_kv_cm')  # with that vocabulary


def branches(scale: paper.Scale = SCALE) -> dict[str, dict]:
  """The seed, which sees some of every domain, and the specialists."""
  runs = paper.branches(scale)
  runs['seed']['data'] = dict(general=0.7, code=0.1, law=0.1, math=0.1)
  return runs


def main_runs(scale: paper.Scale = SCALE) -> dict[str, dict]:
  """BTX, as large as in the paper and as large as BAM, and BAM on its data and for its compute."""
  kv, shared_kv = paper.BAM_KV, paper.BAM_SHARED_KV
  return dict(
    btx=paper.btx(scale),
    btx_6_top3=paper.mixture(scale, 'BTX, 6 experts, top 3', 'btx', num_experts=6, top_k=3),
    bam_kv=paper.mixture(scale, *kv),
    bam_shared_kv=paper.mixture(scale, *shared_kv),
    bam_kv_cm=paper.compute_matched(scale, f'{kv[0]}, CM', kv[1]),
    bam_shared_kv_cm=paper.compute_matched(scale, f'{shared_kv[0]}, CM', shared_kv[1]),
  )


def ablations() -> dict[str, dict]:
  """More experts, routed attention at BTX's compute, and other methods on the same data."""
  return (
    {
      f'btx_{n}': paper.mixture(SCALE, f'BTX, {n} experts', 'btx', num_experts=n)
      for n in MORE_EXPERTS
    }
    | routed('bam', *paper.BAM_KV)
    | routed('bam_shared', *paper.BAM_SHARED_KV)
    | dict(
      sparse=paper.mixture(
        SCALE, 'sparse upcycling', 'sparse', sources=['seed'], num_experts=len(paper.SOURCES)
      ),
      average=paper.mixture(SCALE, 'dense average', 'average'),
      dense=paper.on_all_domains(SCALE, 'seed, trained on', dict(run='seed')),
    )
  )


def routed(name: str, label: str, method: str) -> dict[str, dict]:
  """One and two attention experts a token, at BTX's compute."""
  return {
    f'{name}_top{k}': paper.compute_matched(
      SCALE, f'{label}, attention top {k}, CM', method, attention_top_k=k
    )
    for k in (1, 2)
  }


def learning_rates() -> dict[str, dict]:
  """BTX and BAM at every peak: the runs of the comparison, and theirs at the other peaks."""
  runs = {name: main_runs()[name] for name in SWEPT}
  for name, run in list(runs.items()):
    for peak in PEAKS:
      schedule = run['schedule'] | dict(peak_learning_rate=peak)
      if schedule != run['schedule']:
        other = run | dict(label=f'{run["label"]}, peak {peak:g}', schedule=schedule)
        runs[at_peak(name, peak)] = other
  return runs


def at_peak(name: str, peak: float) -> str:
  """The name of a mixture trained with a peak of PEAKS."""
  chosen = SCALE.mixture_schedule['peak_learning_rate']
  return name if peak == chosen else f'{name}_{peak:g}'.replace('.', '_')


def starts() -> dict[str, dict]:
  """Mixtures with sharper or better gates at the start, faster routers, or a shorter warm-up.

  At first a token's FFN expert is arbitrary and scaled by its gate, about a half, where the dense
  model's FFN was not scaled: a short budget may end before the routers have learnt. And a fixed
  warm-up is a larger part of the compute-matched run.
  """
  runs = {name: main_runs()[name] for name in STARTED}
  for name, run in list(runs.items()):
    upcycle = run['init']['upcycle'] | dict(router_scale=SHARP)
    right = upcycle | dict(router_init='centroids')
    soon = run['schedule'] | dict(warmup_steps=SOON)
    changed = dict(
      sharp=dict(init=dict(upcycle=upcycle)),
      right=dict(init=dict(upcycle=right)),
      soon=dict(schedule=soon),
      fast=dict(learning_rate_factors={'blocks/*/router': FAST}),
    )
    for what, label in STARTS.items():
      runs[f'{name}_{what}'] = run | changed[what] | dict(label=f'{run["label"]}, {label}')
  return runs


def budgets() -> dict[str, dict]:
  """BTX on the tokens of compute-matched BAM; and both with LONG times the compute."""
  label, method = paper.BAM_KV
  long = dataclasses.replace(SCALE, mixture_tokens=LONG * SCALE.mixture_tokens)
  short = dict(label="BTX, on BAM's CM tokens", tokens=main_runs()['bam_kv_cm']['tokens'])
  return dict(
    btx_short=paper.btx(SCALE) | short,
    btx_long=paper.btx(long) | dict(label=f'BTX, {LONG} times the budget'),
    bam_kv_cm_long=paper.compute_matched(long, f'{label}, CM, {LONG} times the budget', method),
  )


def vocabulary() -> dict[str, dict]:
  """BTX and BAM with a vocabulary so large that BAM costs little more."""
  return {name: run for name, run in main_runs(VOCABULARY).items() if name in COMPARED}


STUDIES = dict(
  main=main_runs,
  learning_rates=learning_rates,
  starts=starts,
  budgets=budgets,
  vocabulary=vocabulary,
)
ARGUMENTS = ('', *STUDIES, 'smoke')


def get_config(argument: str = '') -> ConfigDict:
  """The recipe; `argument` is empty or one of ARGUMENTS."""
  if argument not in ARGUMENTS:
    raise UserError(
      f'configs/reproduction.py has no argument {argument!r}: use none, or one of '
      f'{", ".join(ARGUMENTS[1:])}.'
    )
  scale = VOCABULARY if argument == 'vocabulary' else SCALE
  runs = STUDIES[argument]() if argument in STUDIES else main_runs() | ablations()
  recipe = paper.recipe('reproduction', scale, branches(scale) | runs)
  words = scale.model['vocab_size']
  path = 'data/reproduction' if scale is SCALE else f'data/reproduction_{words}'
  recipe['data'] |= dict(path=path, prepare=dict(input='data/corpus', train_tokenizer=words))
  recipe['evaluation'] = dict(batch_size=32, tokens=32_768, domains=paper.DOMAINS)
  return config.complete(paper.smoke(recipe) if argument == 'smoke' else recipe)
