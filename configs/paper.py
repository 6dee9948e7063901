"""The paper's graph of runs as a function of scale, shared by the recipes beside this file.

All functions return the plain dictionaries that `config.complete` reads, which recipes may change.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bam_jax import config
from bam_jax.config import strict
from bam_jax.model import arithmetic
from bam_jax.upcycle import rules

SPECIALTIES = ('code', 'law', 'math')
DOMAINS = ('general', *SPECIALTIES)
SOURCES = ('seed', *SPECIALTIES)  # of a mixture, in the order of its experts

BAM_KV = 'BAM, KV experts', 'bam_kv_experts'
BAM_SHARED_KV = 'BAM, shared KV', 'bam_shared_kv'


@dataclass(frozen=True)
class Scale:
  """Sizes and budgets of the paper's graph."""

  model: Mapping[str, Any]  # of config.Model
  sequence_length: int  # the paper does not print it; 2,048 is usual for models of these sizes
  batch_size: int  # sequences a step
  seed_tokens: int
  seed_schedule: Mapping[str, Any]  # of config.Schedule
  specialist_tokens: int  # of each specialist
  mixture_tokens: int
  mixture_schedule: Mapping[str, Any]
  devices: int
  grad_accum_steps: int
  compute: Mapping[str, Any]  # of config.Compute
  intervals: Mapping[str, Any]  # of config.Intervals


def recipe(name: str, scale: Scale, runs: Mapping[str, dict]) -> dict:
  """A recipe of runs made by the functions below, over the paper's four domains."""
  return dict(
    name=name,
    seed=0,
    model=dict(scale.model),
    data=dict(path='data/bam', sequence_length=scale.sequence_length),
    # A whole number of sequences on each device.
    evaluation=dict(batch_size=scale.devices, tokens=1_048_576, domains=DOMAINS),
    runs=dict(runs),
  )


def branches(scale: Scale) -> dict[str, dict]:
  """The seed, and specialists that continue it on 90% of one domain and 10% of general text.

  Specialists have half of the seed's peak learning rate; the paper gives no other schedule.
  """
  schedule, init = scale.seed_schedule, dict(run='seed')
  half = {**schedule, 'peak_learning_rate': schedule['peak_learning_rate'] / 2}
  general, tokens = dict(general=1.0), scale.seed_tokens
  runs = dict(seed=_run(scale, 'seed', 'scratch', general, 0, tokens, schedule))
  for domain in SPECIALTIES:
    label, data = f'{domain} specialist', {domain: 0.9, 'general': 0.1}
    runs[domain] = _run(scale, label, init, data, 1, scale.specialist_tokens, half)
  return runs


def mixture(
  scale: Scale, label: str, method: str, *, sources: Iterable[str] = SOURCES, **upcycle
) -> dict:
  """Mix: one model of the dense runs `sources`; `upcycle` has other keys of config.Upcycle."""
  upcycle = {'from': tuple(sources), 'method': method, **upcycle}
  experts = upcycle.get('num_experts') or len(upcycle['from'])
  experts = 1 if method == 'average' else experts
  return on_all_domains(scale, label, dict(upcycle=upcycle), experts=experts)


def on_all_domains(scale: Scale, label: str, init: Mapping[str, Any], *, experts: int = 1) -> dict:
  """A run on the batches of all mixtures, a quarter of each domain, whatever it starts from."""
  data, tokens = dict.fromkeys(DOMAINS, 0.25), scale.mixture_tokens
  return _run(scale, label, dict(init), data, 2, tokens, scale.mixture_schedule, experts)


def btx(scale: Scale) -> dict:
  """The baseline: FFN experts, averaged attention."""
  return mixture(scale, 'BTX', 'btx')


def compute_matched(scale: Scale, label: str, method: str, **upcycle) -> dict:
  """A mixture with the tokens, in whole steps, that BTX's training FLOPs buy.

  The paper matches accelerator time. FLOPs can be known beforehand and on any machine; they are
  counted for the model, not for an implementation.
  """
  length, step_tokens = scale.sequence_length, scale.batch_size * scale.sequence_length

  def model(run: dict) -> config.Model:
    upcycle = strict.from_dict(config.Upcycle, run['init']['upcycle'], label)
    return rules.mixture_model(config.Model(**scale.model), upcycle)

  budget = scale.mixture_tokens // step_tokens * step_tokens
  flops = budget * arithmetic.training_flops(model(btx(scale)), length)
  run = mixture(scale, label, method, **upcycle)
  tokens = arithmetic.matched_tokens(model(run), length, flops)
  return run | dict(tokens=tokens // step_tokens * step_tokens)


def _run(scale, label, init, data, data_seed, tokens, schedule, experts=1) -> dict:
  # Parameters over all devices: experts along an axis of up to 4 that divides them, FSDP else.
  expert = math.gcd(4, experts, scale.devices)
  return dict(
    label=label,
    init=init,
    data=data,
    data_seed=data_seed,
    tokens=tokens,
    schedule=dict(schedule),
    batch_size=scale.batch_size,
    grad_accum_steps=scale.grad_accum_steps,
    compute=dict(scale.compute),
    mesh=dict(fsdp=scale.devices // expert, expert=expert),
    intervals=dict(scale.intervals),
  )


def smoke(recipe: Mapping[str, Any]) -> dict:
  """The same graph in about a minute on two CPU cores: its structure, the sample text, 4 steps.

  Heads per KV head, tied embeddings, experts, routing, precision, recomputation and accumulation
  are the recipe's; sizes, budgets, meshes and data are not.
  """
  small = copy.deepcopy(dict(recipe))
  model = config.to_dict(config.Model(**small['model']))
  heads = 2 * model['num_heads'] // model['num_kv_heads']
  width = heads * 16
  ffn_dim = width * model['ffn_dim'] // model['d_model']
  shape = dict(num_heads=heads, num_kv_heads=2, head_dim=16, ffn_dim=ffn_dim)
  small['model'] = model | shape | dict(vocab_size=512, num_layers=2, d_model=width)
  sequence_length, batch_size, steps = 64, 16, 4
  prepare = dict(input='sample', train_tokenizer=512)
  small['data'] = dict(path='{workdir}/data', sequence_length=sequence_length, prepare=prepare)
  small['steps'] = steps  # shrinks warm-ups too
  small['evaluation'] = small.get('evaluation', {}) | dict(batch_size=64, tokens=4_096)
  for run in small['runs'].values():
    compute = run.get('compute', {})
    # In chunks and micro-batches only where the recipe has them.
    run |= dict(
      tokens=steps * batch_size * sequence_length if run['tokens'] else 0,
      batch_size=batch_size,
      grad_accum_steps=min(run.get('grad_accum_steps', 1), 2),
      compute=compute | dict(loss_chunk=min(compute.get('loss_chunk', 0), 256)),
      mesh={},
      intervals=dict(log=1, evaluate=2, checkpoint=2),
    )
  return small
