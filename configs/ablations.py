"""The paper's ablations, each a graph of its own at the small scale; `:NAME` or `:NAME,smoke`.

    python -m bam_jax.main --config=configs/ablations.py:bam_top2 --workdir=runs/small_590m

The seed, the specialists and BTX are those of configs/small_590m.py: in its workdir, finished runs
are not trained again, and the report becomes the ablation's. Data and hardware are the same as for
that recipe; `:NAME,smoke` is the same graph, tiny, for two CPU cores and about a minute.

  btx_5, btx_6, btx_7, btx_8   BTX with 5 to 8 FFN experts, the additional ones copies of the seed's
  btx_6_top3                   BTX with BAM's total and active parameters, and BAM
  bam_top1, bam_top2           BAM with routed attention, and with soft, all at BTX's compute
  sparse                       sparse upcycling: four copies of the seed
  average                      a dense soup of all four, trained like the mixtures
  cm                           BAM at BTX's compute: fewer tokens
  dm                           BAM on BTX's tokens: more compute

The paper's results: average perplexity, Table 6: BTX 10.72, soft 10.47, top-2 10.72, top-1
10.81. Table 1:

                          general   code    law   math
    BTX                     26.72   3.78   6.63   5.77
    BAM, shared KV, dm      25.67   3.64   6.39   5.57
    BAM, shared KV, cm      26.00   3.72   6.50   5.63
    BAM, KV experts, dm     24.02   3.45   6.04   5.31
    BAM, KV experts, cm     24.84   3.53   6.21   5.43
"""

from ml_collections import ConfigDict

import paper
from bam_jax import config
from bam_jax.errors import UserError
from small_590m import SCALE


def more_btx(num_experts: int) -> dict:
  """BTX with copies of the seed's FFN as additional experts."""
  label = f'BTX, {num_experts} experts'
  return {f'btx_{num_experts}': paper.mixture(SCALE, label, 'btx', num_experts=num_experts)}


def btx_top3() -> dict:
  """BTX with the total and active parameters of BAM with KV experts, beside it."""
  label = 'BTX, 6 experts, top 3'
  return dict(
    btx_6_top3=paper.mixture(SCALE, label, 'btx', num_experts=6, top_k=3),
    bam_kv=paper.mixture(SCALE, *paper.BAM_KV),
  )


def routed(attention_top_k: int) -> dict:
  """BAM with routed attention, and with soft attention, at BTX's compute."""
  label, method = paper.BAM_KV
  sparse = paper.compute_matched(
    SCALE, f'{label}, attention top {attention_top_k}', method, attention_top_k=attention_top_k
  )
  soft = paper.compute_matched(SCALE, f'{label}, CM', method)
  return {f'bam_top{attention_top_k}': sparse, 'bam_kv_cm': soft}


def sparse() -> dict:
  """Four copies of the seed, none of them specialised."""
  return dict(
    sparse=paper.mixture(
      SCALE, 'sparse upcycling', 'sparse', sources=['seed'], num_experts=len(paper.SOURCES)
    )
  )


def average() -> dict:
  """One dense model, the mean of the four."""
  return dict(average=paper.mixture(SCALE, 'dense average', 'average'))


def compute_matched() -> dict:
  """Both kinds of BAM, for the training FLOPs of BTX."""
  shared_kv, kv = paper.BAM_SHARED_KV, paper.BAM_KV
  return dict(
    bam_shared_kv_cm=paper.compute_matched(SCALE, f'{shared_kv[0]}, CM', shared_kv[1]),
    bam_kv_cm=paper.compute_matched(SCALE, f'{kv[0]}, CM', kv[1]),
  )


def data_matched() -> dict:
  """Both kinds of BAM, on the tokens of BTX."""
  return dict(
    bam_shared_kv=paper.mixture(SCALE, *paper.BAM_SHARED_KV),
    bam_kv=paper.mixture(SCALE, *paper.BAM_KV),
  )


ABLATIONS = dict(
  btx_5=more_btx(5),
  btx_6=more_btx(6),
  btx_7=more_btx(7),
  btx_8=more_btx(8),
  btx_6_top3=btx_top3(),
  bam_top1=routed(1),
  bam_top2=routed(2),
  sparse=sparse(),
  average=average(),
  cm=compute_matched(),
  dm=data_matched(),
)


def get_config(argument: str = '') -> ConfigDict:
  """The recipe of one ablation; `argument` is NAME or "NAME,smoke"."""
  name, *options = argument.split(',')
  if name not in ABLATIONS or options not in ([], ['smoke']):
    raise UserError(
      f'configs/ablations.py:{argument} is not an ablation: name one of {", ".join(ABLATIONS)}, '
      'as in configs/ablations.py:cm or configs/ablations.py:cm,smoke.'
    )
  runs = paper.branches(SCALE) | dict(btx=paper.btx(SCALE)) | ABLATIONS[name]
  recipe = paper.recipe(f'ablations_{name}', SCALE, runs)
  return config.complete(paper.smoke(recipe) if options else recipe)
