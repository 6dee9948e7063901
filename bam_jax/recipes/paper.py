"""The paper's graph of runs, as a function of its scale; what the recipes of the paper share.

Everything here is in the plain dictionaries that `config.complete` reads, for a recipe to change.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bam_jax import config
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
  # T. The paper does not print its training length; the FLOPs of its tables 7 and 10 are counted
  # at 256, the prompt of its latency measurement. 2,048 is usual for models of these sizes, and
  # statutes and proofs are long.
  sequence_length: int
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
  """A recipe of the given runs over the paper's four domains.

  Args:
    name: of the recipe.
    scale: of everything.
    runs: by name, as the functions below make them.
  """
  return dict(
    name=name,
    seed=0,
    model=dict(scale.model),
    data=dict(path='data/bam', sequence_length=scale.sequence_length),
    # A whole number of sequences on each device.
    evaluation=dict(batch_size=scale.devices, tokens=1_048_576, domains=DOMAINS),
    runs=dict(runs),
  )


def seed(scale: Scale) -> dict:
  """The dense model that everything starts from."""
  return dict(
    label='seed',
    init='scratch',
    data=dict(general=1.0),
    data_seed=0,
    tokens=scale.seed_tokens,
    schedule=dict(scale.seed_schedule),
    **_step(scale),
  )


def specialist(scale: Scale, domain: str) -> dict:
  """Branch: the seed, trained on with 90% of one domain and 10% of general text.

  Half of the seed's peak learning rate; the paper gives no other schedule, so the rest is as the
  seed's.
  """
  peak = scale.seed_schedule['peak_learning_rate'] / 2
  return dict(
    label=f'{domain} specialist',
    init=dict(run='seed'),
    data={domain: 0.9, 'general': 0.1},
    data_seed=1,
    tokens=scale.specialist_tokens,
    schedule=dict(scale.seed_schedule) | dict(peak_learning_rate=peak),
    **_step(scale),
  )


def mixture(
  scale: Scale,
  label: str,
  method: str,
  *,
  sources: Iterable[str] = SOURCES,
  **upcycle,
) -> dict:
  """Mix: one model of dense ones, trained on a quarter of each domain.

  Args:
    scale: of everything.
    label: what tables call it.
    method: of config.Upcycle.
    sources: names of the dense runs.
    **upcycle: other keys of config.Upcycle.
  """
  upcycle = {'from': tuple(sources), 'method': method, **upcycle}
  experts = upcycle.get('num_experts') or len(upcycle['from'])
  return on_all_domains(
    scale, label, dict(upcycle=upcycle), experts=1 if method == 'average' else experts
  )


def on_all_domains(scale: Scale, label: str, init: Mapping[str, Any], *, experts: int = 1) -> dict:
  """A run on the batches of all mixtures, whatever it starts from."""
  return dict(
    label=label,
    init=dict(init),
    data=dict.fromkeys(DOMAINS, 0.25),
    data_seed=2,
    tokens=scale.mixture_tokens,
    schedule=dict(scale.mixture_schedule),
    **_step(scale, experts),
  )


def branches(scale: Scale) -> dict[str, dict]:
  """The seed and its specialists."""
  return dict(seed=seed(scale), **{domain: specialist(scale, domain) for domain in SPECIALTIES})


def btx(scale: Scale) -> dict:
  """The baseline: FFN experts, averaged attention."""
  return mixture(scale, 'BTX', 'btx')


def compute_matched(scale: Scale, label: str, method: str, **upcycle) -> dict:
  """A mixture with the tokens, in whole steps, that BTX's training FLOPs buy.

  The paper matches accelerator time. FLOPs are what can be known beforehand and on any machine;
  those that a model needs are meant, whatever an implementation spends beside them.
  """
  dense = config.Model(**scale.model)
  step_tokens = scale.batch_size * scale.sequence_length

  def model(run: dict) -> config.Model:
    options = {'sources' if k == 'from' else k: v for k, v in run['init']['upcycle'].items()}
    return rules.mixture_model(dense, config.Upcycle(**options))

  steps = scale.mixture_tokens // step_tokens
  flops = arithmetic.training_flops(model(btx(scale)), scale.sequence_length)
  run = mixture(scale, label, method, **upcycle)
  tokens = arithmetic.matched_tokens(model(run), scale.sequence_length, steps * step_tokens * flops)
  return run | dict(tokens=tokens // step_tokens * step_tokens)


def mesh(devices: int, experts: int = 1) -> dict[str, int]:
  """Parameters over all devices: experts along an axis of up to 4 that divides them, FSDP else."""
  expert = math.gcd(4, experts, devices)
  return dict(fsdp=devices // expert, expert=expert)


def smoke(recipe: Mapping[str, Any]) -> dict:
  """The same graph in about a minute on two CPU cores: its structure, the sample text, 4 steps.

  Heads per KV head, tied embeddings, experts, routing, precision, recomputation and accumulation
  are the recipe's; sizes, budgets, meshes and the data are not.
  """
  small = copy.deepcopy(dict(recipe))
  model = config.to_dict(config.Model(**small['model']))
  kv_heads, head_dim = 2, 16
  heads = kv_heads * model['num_heads'] // model['num_kv_heads']
  hidden = heads * head_dim * model['ffn_dim'] // model['d_model']
  small['model'] = model | dict(
    vocab_size=512,
    d_model=heads * head_dim,
    num_layers=2,
    num_heads=heads,
    num_kv_heads=kv_heads,
    head_dim=head_dim,
    ffn_dim=hidden,
  )
  sequence_length, batch_size, steps = 64, 16, 4
  small['data'] = dict(
    path='{workdir}/data',
    sequence_length=sequence_length,
    prepare=dict(input='sample', train_tokenizer=512),
  )
  small['steps'] = steps  # shrinks warm-ups too
  small['evaluation'] = small.get('evaluation', {}) | dict(batch_size=64, tokens=4_096)
  for run in small['runs'].values():
    compute = run.get('compute', {})
    # In chunks and micro-batches where it was, and only there.
    run |= dict(
      tokens=steps * batch_size * sequence_length if run['tokens'] else 0,
      batch_size=batch_size,
      grad_accum_steps=min(run.get('grad_accum_steps', 1), 2),
      compute=compute | dict(loss_chunk=min(compute.get('loss_chunk', 0), 256)),
      mesh={},
      intervals=dict(log=1, evaluate=2, checkpoint=2),
    )
  return small


def _step(scale: Scale, experts: int = 1) -> dict:
  """What a step takes in, and where and how it is computed."""
  return dict(
    batch_size=scale.batch_size,
    grad_accum_steps=scale.grad_accum_steps,
    compute=dict(scale.compute),
    mesh=mesh(scale.devices, experts),
    intervals=dict(scale.intervals),
  )
