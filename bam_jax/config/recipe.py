"""The recipe: a graph of runs, each with a start, its data, a budget and how it trains."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from bam_jax.config import checks
from bam_jax.config.model import Compute, Model
from bam_jax.config.training import Guard, Intervals, Loss, Mesh, Optimizer, Schedule, Watch
from bam_jax.config.upcycle import Upcycle
from bam_jax.errors import UserError


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


Init = Literal['scratch'] | FromRun | FromCheckpoint | FromUpcycle


@dataclass(frozen=True)
class Run:
  """One node of the graph: where it starts, what it reads, how long and how it trains."""

  label: str  # what tables call it
  init: Init
  data: Mapping[str, float]  # domain -> share of the tokens
  tokens: int  # budget, rounded down to whole batches; 0 keeps the initial parameters
  batch_size: int  # sequences a step
  schedule: Schedule
  optimizer: Optimizer = Optimizer()
  grad_accum_steps: int = 1  # micro-batches a step
  router_warmup_steps: int = 0  # first steps, in which only routers learn
  # Of groups of parameters, by the start of their path or a pattern such as "blocks/*/key": what
  # their learning rate is multiplied by. 0 freezes; the longest match wins.
  learning_rate_factors: Mapping[str, float] = field(default_factory=dict)
  data_seed: int = 0  # runs with equal data, seed and batch size see the same batches
  loss: Loss = Loss()
  compute: Compute = Compute()
  mesh: Mesh = Mesh()
  intervals: Intervals = Intervals()
  guard: Guard = Guard()
  watch: Watch = Watch()

  def __post_init__(self):
    checks.sizes(self, 'batch_size', 'grad_accum_steps')
    checks.at_least(self, tokens=0, data_seed=0, router_warmup_steps=0)
    for pattern, factor in self.learning_rate_factors.items():
      if not (math.isfinite(factor) and factor >= 0):
        raise UserError(
          f'learning_rate_factors[{pattern!r}]={factor} is not a factor: give 0 to freeze, or a '
          'positive number.'
        )
    if not self.data:
      raise UserError('data={} names no domain.')
    for domain, share in self.data.items():
      if not (math.isfinite(share) and share > 0):
        raise UserError(f'data[{domain!r}]={share} is not a positive share.')
    shards = self.grad_accum_steps * self.mesh.batch_shards
    if self.batch_size % shards:
      raise UserError(
        f'batch_size={self.batch_size} is not a multiple of grad_accum_steps='
        f'{self.grad_accum_steps} times the {self.mesh.batch_shards} parts that mesh cuts a batch into.'
      )


@dataclass(frozen=True)
class Prepare:
  """Text to prepare when `Data.path` does not exist; the arguments of bam_jax.prepare."""

  input: str  # a folder with one folder or file a domain; "sample" is the text shipped with bam_jax
  train_tokenizer: int = 0  # vocabulary of a byte-level BPE to train; 0 uses `tokenizer`
  tokenizer: str = ''  # a tokenizer.json or SentencePiece model

  def __post_init__(self):
    checks.at_least(self, train_tokenizer=0)
    if bool(self.train_tokenizer) == bool(self.tokenizer):
      raise UserError('give one of train_tokenizer and tokenizer.')


@dataclass(frozen=True)
class Data:
  """Token shards, as bam_jax.prepare writes them."""

  path: str  # "{workdir}" in it is replaced by --workdir
  sequence_length: int  # T, tokens of a training sequence
  prepare: Prepare | None = None

  def __post_init__(self):
    checks.sizes(self, 'sequence_length')


@dataclass(frozen=True)
class Evaluation:
  """Held-out perplexity: after every run over all of the held-out text, during it over a part."""

  batch_size: int = 16  # sequences
  tokens: int = 16_384  # of each domain, read at every `intervals.evaluate` steps
  domains: tuple[str, ...] = ()  # columns of the tables; empty is every domain of the data

  def __post_init__(self):
    checks.sizes(self, 'batch_size')
    checks.at_least(self, tokens=1)


@dataclass(frozen=True)
class Recipe:
  """A graph of runs."""

  name: str
  model: Model  # of the runs that start from scratch
  data: Data
  runs: Mapping[str, Run]
  seed: int = 0  # of initial parameters, routers and data order
  steps: int = 0  # a bound on every run's steps, schedules shrunk to it; 0 is none
  evaluation: Evaluation = Evaluation()

  def __post_init__(self):
    checks.at_least(self, seed=0, steps=0)
    if self.seed >= 2**32:
      raise UserError(f'seed={self.seed} is past the 32 bits that JAX keeps: choose a smaller one.')
    if self.model != self.model.dense():
      raise UserError('model has experts: a mixture comes from a run with an upcycle init.')
    if not self.runs:
      raise UserError('runs={} names no run.')
    for name, run in self.runs.items():
      if not name.replace('_', '').replace('-', '').isalnum():
        raise UserError(f'runs has the name {name!r}: use letters, digits, "-" and "_".')
      if name in ('data', 'report'):
        raise UserError(f'runs has the name {name!r}, a folder of the workdir: choose another.')
      for parent in parents(run):
        if parent not in self.runs:
          raise UserError(f'runs.{name}.init names {parent!r}, which is not one of {[*self.runs]}.')
      if run.tokens and self.total_steps(name) == 0:
        raise UserError(f'runs.{name}.tokens={run.tokens} is below one batch.')
      if run.schedule.warmup_steps > max(self.total_steps(name), 1) and not self.steps:
        raise UserError(
          f'runs.{name}.schedule.warmup_steps={run.schedule.warmup_steps} is above the '
          f'{self.total_steps(name)} steps that its tokens buy.'
        )
      if run.router_warmup_steps >= max(self.total_steps(name), 1) and not self.steps:
        raise UserError(
          f'runs.{name}.router_warmup_steps={run.router_warmup_steps} leaves nothing of the '
          f'{self.total_steps(name)} steps that its tokens buy: lower it.'
        )

  def step_tokens(self, name: str) -> int:
    """Tokens of one optimizer step of a run."""
    return self.runs[name].batch_size * self.data.sequence_length

  def total_steps(self, name: str) -> int:
    """Optimizer steps of a run."""
    steps = self.runs[name].tokens // self.step_tokens(name)
    return min(steps, self.steps) if self.steps else steps

  def warmup_steps(self, name: str) -> int:
    """Warm-up of a run; at most half of a run that `steps` cut short."""
    warmup, total = self.runs[name].schedule.warmup_steps, self.total_steps(name)
    cut_short = total < self.runs[name].tokens // self.step_tokens(name)
    return min(warmup, total // 2) if cut_short else warmup

  def router_warmup_steps(self, name: str) -> int:
    """Steps of a run in which only routers learn; at most half of one that `steps` cut short."""
    warmup, total = self.runs[name].router_warmup_steps, self.total_steps(name)
    cut_short = total < self.runs[name].tokens // self.step_tokens(name)
    return min(warmup, total // 2) if cut_short else warmup


def parents(run: Run) -> tuple[str, ...]:
  """The runs whose final parameters a run starts from."""
  match run.init:
    case FromRun(parent):
      return (parent,)
    case FromUpcycle(upcycle):
      return upcycle.sources
  return ()
