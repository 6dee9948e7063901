"""How a run trains: schedule, optimizer, loss, mesh, and what it does every so many steps."""

from dataclasses import dataclass
from typing import Literal

from bam_jax.config import checks
from bam_jax.errors import UserError


@dataclass(frozen=True)
class Schedule:
  """Learning rate: linear warm-up from 0 to the peak, then cosine decay to a fraction of it."""

  peak_learning_rate: float
  warmup_steps: int
  min_lr_ratio: float = 0.1  # learning rate after the last step over the peak

  def __post_init__(self):
    checks.positive(self, 'peak_learning_rate')
    checks.at_least(self, warmup_steps=0)
    checks.fraction(self, 'min_lr_ratio')


@dataclass(frozen=True)
class Optimizer:
  """AdamW; weight decay on everything but the scales of norms and the biases of routers."""

  weight_decay: float = 0.1
  b1: float = 0.9
  b2: float = 0.95
  epsilon: float = 1e-8
  clip_norm: float = 1.0  # bound on the gradient's global norm; 0 does not clip

  def __post_init__(self):
    checks.positive(self, 'epsilon')
    checks.at_least(self, weight_decay=0, clip_norm=0)
    checks.fraction(self, 'b1', 'b2')
    if 1 in (self.b1, self.b2):
      raise UserError(f'b1={self.b1} and b2={self.b2} must be below 1: a mean that never moves.')


@dataclass(frozen=True)
class Loss:
  """Weights of the routers' losses beside the negative log-likelihood, summed over layers."""

  load_balance: float = 1e-2  # of L_LB = N sum_i f_i P_i; top-k routers only (Switch Transformers)
  router_z: float = 1e-3  # of L_z = mean logsumexp^2; every router (ST-MoE)
  # What the two are over with grad_accum_steps > 1: 'global_batch' costs one more forward pass.
  balance_over: Literal['micro_batch', 'global_batch'] = 'micro_batch'
  expert_bias_update_rate: float = (
    1e-3  # what a step moves the biases of models with `expert_bias` by
  )

  def __post_init__(self):
    checks.at_least(self, load_balance=0, router_z=0, expert_bias_update_rate=0)


@dataclass(frozen=True)
class Mesh:
  """Devices along each axis of the mesh; their product is the number of devices used."""

  data: int = 1  # replicas
  fsdp: int = 1  # parameters and optimizer sharded
  expert: int = 1  # experts of mixtures; more FSDP for dense models
  tensor: int = 1  # heads and FFN columns

  def __post_init__(self):
    checks.sizes(self, 'data', 'fsdp', 'expert', 'tensor')

  @property
  def size(self) -> int:
    return self.data * self.fsdp * self.expert * self.tensor

  @property
  def batch_shards(self) -> int:
    """Parts that a batch is cut into."""
    return self.data * self.fsdp * self.expert


@dataclass(frozen=True)
class Intervals:
  """Steps between the things a run does beside training; 0 is only at the end."""

  log: int = 10
  evaluate: int = 0
  checkpoint: int = 0
  keep: int = 2  # checkpoints that stay on disk

  def __post_init__(self):
    checks.at_least(self, log=1, evaluate=0, checkpoint=0, keep=1)


@dataclass(frozen=True)
class Guard:
  """What happens at a step whose loss or gradient would do harm."""

  on_nan: Literal['halt', 'skip'] = 'halt'  # NaN or infinity in the loss or the gradient
  on_spike: Literal['ignore', 'halt', 'skip'] = 'ignore'
  # A spike: loss or gradient norm is so many standard deviations above its mean.
  spike_deviations: float = 6.0
  window: int = 128  # steps that both are over; a run's first ones are no spikes
  max_skipped: int = 10  # steps in a row; then the run halts

  def __post_init__(self):
    checks.positive(self, 'spike_deviations')
    checks.sizes(self, 'window')
    checks.at_least(self, window=2, max_skipped=1)


@dataclass(frozen=True)
class Watch:
  """How a run is looked at; nothing of it changes the run."""

  profile_from: int = 0  # the first step that jax.profiler records, into <run>/profile; 0 is none
  profile_steps: int = 3
  # Seconds without a finished step, if ten times the usual, until a line says what it waits for; 0
  # is never.
  stall_seconds: float = 120.0

  def __post_init__(self):
    checks.at_least(self, profile_from=0, profile_steps=1, stall_seconds=0)
