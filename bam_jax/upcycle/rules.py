"""How each array of a mixture is made from dense models: one row for each target path."""

import dataclasses
from collections.abc import Sequence

from flax import traverse_util

from bam_jax import config
from bam_jax.checkpoint import manifest
from bam_jax.config.strict import require
from bam_jax.model import transformer

# Paths of the embeddings, and of the directions of experts' differences from them.
EMBEDDINGS = {'embed/table': 'embed/directions', 'unembed/kernel': 'unembed/directions'}


def mixture_model(
  dense: config.Model, upcycle: config.Upcycle, ropes: Sequence[config.Rope] = ()
) -> config.Model:
  """The mixture that a method makes from dense models; `ropes` are the sources', if they differ.

  UserError if norms='fold' and they have norms that cannot be folded.
  """
  attention = ffn = None
  if upcycle.method in ('bam_kv_experts', 'bam_shared_kv'):
    attention = config.AttentionExperts(
      num_experts=upcycle.experts,
      top_k=upcycle.attention_top_k,
      shared_kv=upcycle.method == 'bam_shared_kv',
      renormalize=upcycle.renormalize,
      ropes=(*ropes, *ropes[:1] * len(upcycle.copies)),
    )
  if upcycle.method != 'average':
    ffn = config.FFNExperts(
      num_experts=upcycle.experts,
      top_k=upcycle.top_k,
      renormalize=upcycle.renormalize,
      capacity_factor=upcycle.capacity_factor,
      expert_bias=upcycle.expert_bias,
    )
  names = 'router_input', 'router_memory', 'embedding_rank'
  parts = {name: getattr(upcycle, name) for name in names}
  parts |= dict(attention_experts=attention, ffn_experts=ffn)
  mixture = dataclasses.replace(dense, **parts)
  if upcycle.norms == 'fold':
    folds(mixture)
  return mixture


def folds(mixture: config.Model) -> dict[str, str]:
  """What norms='fold' does: the paths of matrices, and of the norm that goes into each.

  W (w * x) = (W diag(w)) x, so that a part of experts computes the same after a norm without a
  scale. Keys and values that its experts share are folded before their mean.
  """
  names, attention, ffn = mixture.norms, mixture.attention_experts, mixture.ffn_experts
  require('norm' in names, "norms='fold' requires norms before the parts: set norms='mean'.")
  wrong = "norms='fold' cannot move a norm's bias into a matrix: set norms='mean'."
  require(mixture.norm != 'layernorm_bias', wrong)
  wrong = "norms='fold': a parallel block has one norm for the FFN and attention, which is averaged"
  fix = "choose a method with attention experts, or norms='mean'."
  require('ffn_norm' in names or attention and ffn, f'{wrong}: {fix}')
  parts = ('attention/query', 'attention/key', 'attention/value') if attention else ()
  folded = {f'blocks/{part}': 'blocks/norm/scale' for part in parts}
  ffn_norm = f'blocks/{"ffn_norm" if "ffn_norm" in names else "norm"}/scale'
  return folded | (dict.fromkeys(('blocks/ffn/gate', 'blocks/ffn/up'), ffn_norm) if ffn else {})


def warning(mixture: config.Model) -> str:
  """A sentence about routers that the text cannot train; '' if it trains all of them."""
  parts = {'attention': mixture.attention_experts, 'FFN': mixture.ffn_experts}
  stuck = [name for name, part in parts.items() if part and part.renormalize and part.top_k == 1]
  if not stuck:
    return ''
  return (
    f'The routers of {" and ".join(stuck)} choose one expert a token and renormalize, so that '
    'every gate is 1 and only their own losses train them: raise k, or set renormalize=False.'
  )


def rules(mixture: config.Model, norms: str = 'mean') -> tuple[manifest.Made, ...]:
  """How each array of a mixture is made: `target` from the sources' `source`; paper section 3.

  `how` is 'mean' over the sources (norms, embeddings, all without experts), 'stack' on axis 1
  (experts), 'fold' (ones, see `folds`), 'router' (drawn) or 'zero'; the last two have no source.
  Embeddings with `embedding_rank` are made by 'differences', along 'directions'; see `merge`.
  ValueError for an array without a rule.
  """
  attention, ffn = mixture.attention_experts, mixture.ffn_experts
  query_out, experts = ('stack' if attention else 'mean'), ('stack' if ffn else 'mean')
  key_value = 'stack' if attention and not attention.shared_kv else 'mean'
  word = 'differences' if mixture.embedding_rank else 'mean'
  hows = {  # by the first word of an array's name: a head's norm is treated like the head
    'table': word, 'kernel': word, 'directions': 'directions', 'scale': 'mean', 'bias': 'mean',
    'query': query_out, 'key': key_value, 'value': key_value, 'out': query_out,
    'gate': experts, 'up': experts, 'down': experts, 'router': 'router', 'expert': 'zero',
  }  # fmt: skip
  folded = folds(mixture).values() if norms == 'fold' else ()
  sources = {directions: path for path, directions in EMBEDDINGS.items()}
  made = []
  network = transformer.Network(mixture, config.Compute())
  for path in traverse_util.flatten_dict(network.abstract(), sep='/'):
    name = path.rpartition('/')[2]
    if (how := hows.get(name.partition('_')[0])) is None:
      raise ValueError(f'No rule for {path}.')
    source = None if how in ('router', 'zero') else sources.get(path, path)
    made.append(manifest.Made(path, 'fold' if path in folded else how, source))
  return tuple(made)


def expert_names(upcycle: config.Upcycle, sources: Sequence[str]) -> tuple[str, ...]:
  """The name of each expert's source, from the sources' names."""
  return (*sources, *[sources[0]] * len(upcycle.copies))
