"""The recipe: a graph of runs, each with a start, data, a budget and training options."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from ml_collections import ConfigDict

from bam_jax.config import strict
from bam_jax.config.model import Compute, Model
from bam_jax.config.strict import Count, Fraction, NonNegative, Positive, PositiveInt, Size
from bam_jax.config.upcycle import Grow, Upcycle


@dataclass(frozen=True)
class Schedule(strict.Section):
  """Learning rate: linear warm-up from 0 to the peak, then cosine decay to a fraction of it."""

  peak_learning_rate: Positive
  warmup_steps: Count
  min_lr_ratio: Fraction = 0.1  # learning rate after the last step over the peak


@dataclass(frozen=True)
class Optimizer(strict.Section):
  """AdamW; weight decay on everything except the scales of norms and all biases."""

  weight_decay: NonNegative = 0.1
  b1: Fraction = 0.9
  b2: Fraction = 0.95
  epsilon: Positive = 1e-8
  clip_norm: NonNegative = 1.0  # bound on the gradient's global norm; 0 does not clip

  def check(self):
    # Adam's bias correction would divide by zero.
    self.require(1 not in (self.b1, self.b2), f'b1={self.b1} and b2={self.b2} must be below 1.')


@dataclass(frozen=True)
class Loss(strict.Section):
  """Weights of the router losses, summed over layers and added to the negative log-likelihood."""

  load_balance: NonNegative = 1e-2  # of N sum_i f_i P_i; top-k routers only (Switch Transformers)
  router_z: NonNegative = 1e-3  # of mean logsumexp^2; every router (ST-MoE)
  # The batch of both with grad_accum_steps > 1: 'global_batch' costs one more forward pass.
  balance_over: Literal['micro_batch', 'global_batch'] = 'micro_batch'
  expert_bias_update_rate: NonNegative = 1e-3  # change of the biases of `expert_bias` in a step


@dataclass(frozen=True)
class Mesh(strict.Section):
  """Devices along each axis of the mesh; their product is the number of devices used."""

  data: Size = 1  # replicas
  fsdp: Size = 1  # parameters and optimizer sharded
  expert: Size = 1  # experts of mixtures; more FSDP for dense models
  tensor: Size = 1  # heads and FFN columns

  @property
  def size(self) -> int:
    return self.data * self.fsdp * self.expert * self.tensor

  @property
  def batch_shards(self) -> int:
    """Parts that a batch is split into."""
    return self.data * self.fsdp * self.expert


@dataclass(frozen=True)
class Intervals(strict.Section):
  """Steps between a run's periodic actions; 0: only at the end."""

  log: PositiveInt = 10
  evaluate: Count = 0
  checkpoint: Count = 0
  keep: PositiveInt = 2  # checkpoints to keep, the newest
  keep_every: Count = 0  # and for ever those of steps that it divides; 0: none


@dataclass(frozen=True)
class Guard(strict.Section):
  """What happens at a step that would do harm."""

  on_nan: Literal['halt', 'skip'] = 'halt'  # NaN or infinity in the loss or the gradient
  max_skipped: PositiveInt = 10  # consecutive steps, after which the run halts


@dataclass(frozen=True)
class Watch(strict.Section):
  """How a run is observed; without effect on the run."""

  profile_from: Count = 0  # the first step that jax.profiler records, into <run>/profile; 0: none
  profile_steps: PositiveInt = 3
  # A run that finishes no step for this many seconds prints the stack of every thread; 0: never.
  stall_seconds: NonNegative = 600.0


@dataclass(frozen=True)
class FromRun:
  """Start from the final parameters of another run of the recipe."""

  run: str


@dataclass(frozen=True)
class FromCheckpoint:
  """Start from the parameters of a checkpoint: a step's folder, or a run's (its newest step)."""

  checkpoint: str


@dataclass(frozen=True)
class FromUpcycle:
  """Start from a mixture of other runs' final parameters."""

  upcycle: Upcycle


@dataclass(frozen=True)
class FromGrow:
  """Start from a mixture run's final parameters, and a dense run's as one more expert."""

  grow: Grow


Init = Literal['scratch'] | FromRun | FromCheckpoint | FromUpcycle | FromGrow


@dataclass(frozen=True)
class Run(strict.Section):
  """One node of the graph: its start, data, budget and training options."""

  label: str  # its name in tables
  init: Init
  data: Mapping[str, float]  # domain -> share of the tokens
  tokens: Count  # budget, rounded down to whole batches; 0 keeps the initial parameters
  batch_size: Size  # sequences a step
  schedule: Schedule
  optimizer: Optimizer = Optimizer()
  grad_accum_steps: Size = 1  # micro-batches a step
  router_warmup_steps: Count = 0  # number of first steps in which only routers learn
  # Factors of the learning rate of groups of parameters, by path prefix or a pattern such as
  # "blocks/*/key". 0 freezes; the longest match wins.
  learning_rate_factors: Mapping[str, float] = field(default_factory=dict)
  freeze: tuple[str, ...] = ()  # groups with the factor 0: "embed", "unembed", "final_norm"
  data_seed: Count = 0  # runs with equal data, seed and batch size see the same batches
  loss: Loss = Loss()
  compute: Compute = Compute()
  mesh: Mesh = Mesh()
  intervals: Intervals = Intervals()
  guard: Guard = Guard()
  watch: Watch = Watch()

  def check(self):
    for pattern, factor in self.learning_rate_factors.items():
      wrong = f'learning_rate_factors[{pattern!r}]={factor} is neither positive nor 0 (frozen).'
      self.require(0 <= factor < math.inf, wrong)
    self.require(self.data, 'data={} names no domain.')
    for domain, share in self.data.items():
      self.require(0 < share < math.inf, f'data[{domain!r}]={share} is not a positive share.')
    grad_accum_steps, parts = self.grad_accum_steps, self.mesh.batch_shards
    fits = self.batch_size % (grad_accum_steps * parts) == 0
    factors = f'{grad_accum_steps=} times the {parts} parts that mesh splits a batch into'
    self.require(fits, f'batch_size={self.batch_size} is not a multiple of {factors}.')


@dataclass(frozen=True)
class Prepare(strict.Section):
  """Text to prepare when `Data.path` does not exist; the arguments of bam_jax.prepare."""

  input: str  # a folder with one folder or file a domain; "sample" is the text shipped with bam_jax
  train_tokenizer: Count = 0  # vocabulary of a byte-level BPE to train; 0 uses `tokenizer`
  tokenizer: str = ''  # a tokenizer.json or SentencePiece model
  skip_unknown: bool = False  # leave out files of a kind that cannot be read
  min_decoded: Fraction = 0.9  # of the characters that the tokenizer must give back

  def check(self):
    both = bool(self.train_tokenizer) == bool(self.tokenizer)
    self.require(not both, 'exactly one of train_tokenizer and tokenizer is required.')


@dataclass(frozen=True)
class Data(strict.Section):
  """Prepared datasets, as bam_jax.prepare writes them."""

  path: str  # on a disk or in gs://; "{workdir}" in it is replaced by --workdir
  sequence_length: Size  # T, tokens of a training sequence
  prepare: Prepare | None = None
  more: tuple[str, ...] = ()  # other datasets of the same tokenizer, whose domains are added


@dataclass(frozen=True)
class Evaluation(strict.Section):
  """Held-out perplexity: on all held-out text after a run, on a part of it during the run."""

  batch_size: Size = 16  # sequences
  tokens: PositiveInt = 16_384  # of each domain, read at every `intervals.evaluate` steps
  domains: tuple[str, ...] = ()  # columns of the tables; empty is every domain of the data


@dataclass(frozen=True)
class Recipe(strict.Section):
  """A graph of runs."""

  name: str
  model: Model  # of the runs that start from scratch
  data: Data
  runs: Mapping[str, Run]
  seed: Annotated[int, (0, 2**32 - 1)] = 0  # of parameters, routers, data; JAX keeps 32 bits
  steps: Count = 0  # limit on every run's steps, with schedules shortened to match; 0: none
  evaluation: Evaluation = Evaluation()

  def check(self):
    is_dense = self.model == self.model.dense()
    self.require(is_dense, 'model has experts: only a run with an upcycle init may have them.')
    self.require(self.runs, 'runs={} names no run.')
    for name, run in self.runs.items():
      plain = name.replace('_', '').replace('-', '').isalnum() and name not in ('data', 'report')
      fix = 'use letters, digits, "-", "_"; "data", "report" are reserved.'
      self.require(plain, f'runs has the name {name!r}: {fix}')
      key, steps, tokens = f'runs.{name}', self.total_steps(name), run.tokens
      for source in parents(run):
        wrong = f'{key}.init names {source!r}, which is not one of {[*self.runs]}.'
        self.require(source in self.runs, wrong)
      self.require(steps or not tokens, f'{key}.{tokens=} is below one batch.')
      if not self.steps:  # which cuts warm-ups short too
        warmup, routers, of = run.schedule.warmup_steps, run.router_warmup_steps, f'{tokens=}'
        wrong = f'{key}.schedule.warmup_steps={warmup} is above the {steps} steps of {of}.'
        self.require(warmup <= max(steps, 1), wrong)
        wrong = f'{key}.router_warmup_steps={routers} leaves none of the {steps} steps of {of}.'
        self.require(routers < max(steps, 1), wrong)

  def step_tokens(self, name: str) -> int:
    """Tokens of one optimizer step of a run."""
    return self.runs[name].batch_size * self.data.sequence_length

  def total_steps(self, name: str) -> int:
    """Optimizer steps of a run."""
    steps = self.runs[name].tokens // self.step_tokens(name)
    return min(steps, self.steps) if self.steps else steps

  def warmup_steps(self, name: str) -> int:
    """Warm-up steps of a run; at most half of a run shortened by `steps`."""
    return self._shrunk(self.runs[name].schedule.warmup_steps, name)

  def router_warmup_steps(self, name: str) -> int:
    """Steps of a run in which only routers learn; at most half of a run shortened by `steps`."""
    return self._shrunk(self.runs[name].router_warmup_steps, name)

  def _shrunk(self, warmup: int, name: str) -> int:
    total, tokens = self.total_steps(name), self.runs[name].tokens
    return min(warmup, total // 2) if total < tokens // self.step_tokens(name) else warmup


def parents(run: Run) -> tuple[str, ...]:
  """The runs whose final parameters a run starts from."""
  if isinstance(run.init, FromRun):
    return (run.init.run,)
  if isinstance(run.init, FromGrow):
    return run.init.grow.mixture, run.init.grow.dense
  return run.init.upcycle.sources if isinstance(run.init, FromUpcycle) else ()


def parse(config: Mapping) -> Recipe:
  """A recipe from plain nested mappings; UserError names what is wrong."""
  return strict.from_dict(Recipe, config, 'config')


def complete(config: Mapping) -> ConfigDict:
  """The value for `get_config` to return: the recipe, checked and with all defaults filled in.

  All its keys can be set on the command line: `--config.runs.seed.compute.dtype=bfloat16`. Keys
  keep the recipe's order.
  """

  def convert(value):
    if not isinstance(value, dict):
      return tuple(value) if isinstance(value, list) else value
    return ConfigDict({key: convert(item) for key, item in value.items()}, sort_keys=False)

  return convert(strict.to_dict(parse(config)))
