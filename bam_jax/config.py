"""Every key of a recipe, typed and frozen; the one place that says what a configuration may be.

A recipe file's `get_config(arg)` returns an `ml_collections.ConfigDict`. `parse` turns it into the
dataclasses below or raises one `UserError` sentence that names the key and the fix: a key that does
not exist, a missing one, a wrong type, a value out of range, and whatever does not fit together.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ml_collections import ConfigDict

from bam_jax import strict
from bam_jax.errors import UserError

Method = Literal['bam_kv_experts', 'bam_shared_kv', 'btx', 'sparse', 'average']


def _check_top_k(experts: 'AttentionExperts | FFNExperts') -> None:
  if experts.top_k > experts.num_experts:
    raise UserError(f'top_k={experts.top_k} is above num_experts={experts.num_experts}.')


def _at_least(config, **bounds: float) -> None:
  for key, bound in bounds.items():
    value = getattr(config, key)
    if not (math.isfinite(value) and value >= bound):
      raise UserError(f'{key}={value} is below {bound}.')


def _positive(config, *keys: str) -> None:
  for key in keys:
    value = getattr(config, key)
    if not (math.isfinite(value) and value > 0):
      raise UserError(f'{key}={value} is not positive.')


def _fraction(config, *keys: str) -> None:
  for key in keys:
    if not 0 <= getattr(config, key) <= 1:
      raise UserError(f'{key}={getattr(config, key)} is not between 0 and 1.')


@dataclass(frozen=True)
class AttentionExperts:
  """The mixture of attention (MoA) of every block; paper section 3."""

  num_experts: int  # N
  top_k: int = 0  # attention experts a token visits; 0 is soft routing, every token visits all
  shared_kv: bool = False  # one key and one value projection serve all the experts
  renormalize: bool = False  # divide the k gates by their sum; no effect on soft routing

  def __post_init__(self):
    _at_least(self, num_experts=1, top_k=0)
    _check_top_k(self)


@dataclass(frozen=True)
class FFNExperts:
  """The mixture of SwiGLU experts of every block."""

  num_experts: int  # N
  top_k: int = 1  # experts a token visits
  renormalize: bool = False  # divide the k gates by their sum; the paper does not
  # Rows of an expert's buffer over its even share, tokens * top_k / num_experts; tokens past it
  # are dropped. 0 is dropless.
  buffer_factor: float = 0.0
  # A bias that evens the experts' loads: it counts in choosing the top-k and not in the gates.
  balance_bias: bool = False

  def __post_init__(self):
    _at_least(self, num_experts=1, top_k=1)
    _check_top_k(self)
    if self.buffer_factor != 0 and not self.buffer_factor >= 1:
      raise UserError(f'buffer_factor={self.buffer_factor} is neither 0 (dropless) nor at least 1.')


@dataclass(frozen=True)
class Model:
  """The decoder-only transformer with parallel blocks; dense without the two experts' sections."""

  vocab_size: int  # V
  d_model: int  # D
  num_layers: int  # L
  num_heads: int  # H
  num_kv_heads: int  # G, divides H
  head_dim: int  # K, even
  ffn_dim: int  # F, the hidden width: half of the paper's fused gate+up width
  tied_embeddings: bool = True  # the output embedding is the input embedding
  rope_theta: float = 10_000.0
  norm_epsilon: float = 1e-5
  # LayerNorm of every head's query and key before RoPE, a scale for each head and channel.
  qk_norm: bool = False
  logit_scale: float = 1.0  # what logits are multiplied by
  attention_experts: AttentionExperts | None = None
  ffn_experts: FFNExperts | None = None

  def __post_init__(self):
    _at_least(
        self, vocab_size=2, d_model=1, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2,
        ffn_dim=1,
    )  # fmt: skip
    _positive(self, 'rope_theta', 'norm_epsilon', 'logit_scale')
    if self.num_heads % self.num_kv_heads:
      raise UserError(
        f'num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}.'
      )
    if self.head_dim % 2:
      raise UserError(f'head_dim={self.head_dim} is odd: rotary embeddings turn pairs.')

  def dense(self) -> 'Model':
    """The same model without experts."""
    return dataclasses.replace(self, attention_experts=None, ffn_experts=None)


@dataclass(frozen=True)
class Compute:
  """How the model is computed; nothing here changes what is computed."""

  dtype: Literal['float32', 'bfloat16'] = 'float32'  # of activations and matmul operands
  # What the backward pass computes again of each block: 'none' nothing but weights that a mesh
  # gathers, 'matmuls' what takes no matmul, 'attention' the FFN too, 'full' everything.
  remat: Literal['none', 'matmuls', 'attention', 'full'] = 'none'
  loss_chunk: int = 0  # tokens whose float32 logits exist at once; 0 is all of a micro-batch
  unroll: int = 1  # layers a step of the scan over layers
  offload_optimizer: bool = False  # keep the optimizer's moments in host memory between steps

  def __post_init__(self):
    _at_least(self, loss_chunk=0, unroll=1)


@dataclass(frozen=True)
class Schedule:
  """Learning rate: linear warm-up from 0 to the peak, then cosine decay to a fraction of it."""

  peak_learning_rate: float
  warmup_steps: int
  final_fraction: float = 0.1  # learning rate after the last step over the peak

  def __post_init__(self):
    _positive(self, 'peak_learning_rate')
    _at_least(self, warmup_steps=0)
    _fraction(self, 'final_fraction')


@dataclass(frozen=True)
class Optimizer:
  """AdamW; weight decay on everything but the scales of norms and the biases of routers."""

  weight_decay: float = 0.1
  b1: float = 0.9
  b2: float = 0.95
  epsilon: float = 1e-8
  clip_norm: float = 1.0  # bound on the gradient's global norm; 0 does not clip

  def __post_init__(self):
    _positive(self, 'epsilon')
    _at_least(self, weight_decay=0, clip_norm=0)
    _fraction(self, 'b1', 'b2')
    if 1 in (self.b1, self.b2):
      raise UserError(f'b1={self.b1} and b2={self.b2} must be below 1: a mean that never moves.')


@dataclass(frozen=True)
class Loss:
  """Weights of the routers' losses beside the negative log-likelihood, summed over layers."""

  load_balance: float = 1e-2  # of L_LB = N sum_i f_i P_i; top-k routers only (Switch Transformers)
  router_z: float = 1e-3  # of L_z = mean logsumexp^2; every router (ST-MoE)
  # What the two are over with accumulate > 1: 'global_batch' costs one more forward pass.
  balance_over: Literal['micro_batch', 'global_batch'] = 'micro_batch'
  bias_rate: float = 1e-3  # what a step moves the biases of models with `balance_bias` by

  def __post_init__(self):
    _at_least(self, load_balance=0, router_z=0, bias_rate=0)


@dataclass(frozen=True)
class Mesh:
  """Devices along each axis of the mesh; their product is the number of devices used."""

  data: int = 1  # replicas
  fsdp: int = 1  # parameters and optimizer sharded
  expert: int = 1  # experts of mixtures; more FSDP for dense models
  tensor: int = 1  # heads and FFN columns

  def __post_init__(self):
    _at_least(self, data=1, fsdp=1, expert=1, tensor=1)

  @property
  def size(self) -> int:
    return self.data * self.fsdp * self.expert * self.tensor

  @property
  def batch_shards(self) -> int:
    """Parts that a batch is cut into."""
    return self.data * self.fsdp * self.expert


@dataclass(frozen=True)
class Every:
  """Steps between the things a run does beside training; 0 is only at the end."""

  log: int = 10
  evaluate: int = 0
  checkpoint: int = 0
  keep: int = 2  # checkpoints that stay on disk

  def __post_init__(self):
    _at_least(self, log=1, evaluate=0, checkpoint=0, keep=1)


@dataclass(frozen=True)
class FromRun:
  """Start from the final parameters of another run of the recipe."""

  run: str


@dataclass(frozen=True)
class FromCheckpoint:
  """Start from the parameters of a checkpoint: a step's folder, or a run's (its newest step)."""

  checkpoint: str


@dataclass(frozen=True)
class Upcycle:
  """Mix dense runs into one model; paper section 3."""

  sources: tuple[str, ...] = field(metadata={'key': 'from'})  # names of dense runs, experts' order
  method: Method
  # Experts of the mixture; 0 is one for each source. More than the sources: copies of the first.
  num_experts: int = 0
  top_k: int = 1  # of the FFN experts
  attention_top_k: int = 0  # of the attention experts; 0 is soft
  renormalize: bool = False
  buffer_factor: float = 0.0
  router_scale: float = 1.0  # routers start normal with this standard deviation over sqrt(D)
  # The rest goes beyond the paper and is off; docs/options.md says when to use which.
  # 'zero': equal gates; 'centroids': columns of length router_scale toward each source's data.
  router_init: Literal['random', 'zero', 'centroids'] = 'random'
  average: Literal['mean', 'weighted', 'first'] = 'mean'  # of the sources, where nothing is stacked
  weights: tuple[float, ...] = ()  # of the sources, in any unit, for 'weighted'
  drop_ratio: float = 0.0  # of the hidden dimensions of copied FFN experts, drawn anew
  noise: float = 0.0  # added to copied experts, in standard deviations of each array
  balance_bias: bool = False  # of the FFN experts

  def __post_init__(self):
    _at_least(self, num_experts=0, top_k=1, attention_top_k=0, router_scale=0)
    if len(set(self.sources)) != len(self.sources):
      raise UserError(f'from={list(self.sources)} names a source twice.')
    least = 1 if self.method == 'sparse' else 2
    if len(self.sources) < least or (self.method == 'sparse' and len(self.sources) > 1):
      wants = 'exactly one source' if self.method == 'sparse' else 'at least two sources'
      raise UserError(
        f'from={list(self.sources)} has {len(self.sources)}: method {self.method!r} needs {wants}.'
      )
    if self.method == 'sparse' and not self.num_experts:
      raise UserError("num_experts=0 is not a size for method 'sparse': say how many copies.")
    if self.num_experts and self.num_experts < len(self.sources):
      raise UserError(
        f'num_experts={self.num_experts} is below the {len(self.sources)} sources of from='
        f'{list(self.sources)}: every source becomes an expert.'
      )
    if self.attention_top_k and self.method not in ('bam_kv_experts', 'bam_shared_kv'):
      raise UserError(
        f'attention_top_k={self.attention_top_k} has no meaning for method {self.method!r}, '
        'which has no attention experts.'
      )
    self._check_average()
    self._check_copies()
    self._check_router_init()
    if self.balance_bias and self.method == 'average':
      raise UserError(
        "balance_bias=True has no meaning for method 'average', which has no router: leave it out."
      )

  def _check_average(self) -> None:
    weights, sources = list(self.weights), list(self.sources)
    if self.average != 'weighted':
      if weights:
        raise UserError(
          f"weights={weights} has no meaning with average={self.average!r}: set average='weighted'."
        )
    elif len(weights) != len(sources):
      raise UserError(
        f"weights={weights} has {len(weights)} numbers: average='weighted' needs one for each of "
        f'from={sources}.'
      )
    for weight in weights:
      if not (math.isfinite(weight) and weight > 0):
        raise UserError(f'weights={weights} has {weight}, which is not positive.')

  def _check_copies(self) -> None:
    _fraction(self, 'drop_ratio')
    _at_least(self, noise=0)
    for key in ('drop_ratio', 'noise'):
      if getattr(self, key) and not self.copies:
        raise UserError(
          f'{key}={getattr(self, key)} changes copied experts, and method {self.method!r} with '
          f'{self.experts} experts of {len(self.sources)} sources has none: set {key}=0 or raise '
          'num_experts of a method with experts.'
        )

  def _check_router_init(self) -> None:
    if self.router_init == 'random':
      return
    if self.method == 'average' or (self.method == 'sparse' and self.router_init == 'centroids'):
      lacks = 'no router' if self.method == 'average' else 'one source, hence one centroid'
      raise UserError(
        f'router_init={self.router_init!r} has no meaning for method {self.method!r}, which has '
        f"{lacks}: leave it at 'random'."
      )
    if self.router_init == 'zero' and self.router_scale != 1:
      raise UserError(
        f"router_scale={self.router_scale} has no meaning with router_init='zero': leave it out."
      )

  @property
  def experts(self) -> int:
    """Experts of the mixture."""
    return self.num_experts or len(self.sources)

  @property
  def copies(self) -> range:
    """Numbers of the experts that are copies of the first source's."""
    return range(len(self.sources), self.experts if self.method != 'average' else 0)


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
  accumulate: int = 1  # micro-batches a step
  router_warmup_steps: int = 0  # first steps, in which only routers learn
  # Of groups of parameters, by the start of their path or a pattern such as "blocks/*/key": what
  # their learning rate is multiplied by. 0 freezes; the longest match wins.
  learning_rate_factors: Mapping[str, float] = field(default_factory=dict)
  data_seed: int = 0  # runs with equal data, seed and batch size see the same batches
  loss: Loss = Loss()
  compute: Compute = Compute()
  mesh: Mesh = Mesh()
  every: Every = Every()

  def __post_init__(self):
    _at_least(self, tokens=0, batch_size=1, accumulate=1, data_seed=0, router_warmup_steps=0)
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
    shards = self.accumulate * self.mesh.batch_shards
    if self.batch_size % shards:
      raise UserError(
        f'batch_size={self.batch_size} is not a multiple of accumulate={self.accumulate} times '
        f'the {self.mesh.batch_shards} parts that mesh cuts a batch into.'
      )


@dataclass(frozen=True)
class Prepare:
  """Text to prepare when `Data.path` does not exist; the arguments of bam_jax.prepare."""

  input: str  # a folder with one folder or file a domain; "sample" is the text shipped with bam_jax
  train_tokenizer: int = 0  # vocabulary of a byte-level BPE to train; 0 uses `tokenizer`
  tokenizer: str = ''  # a tokenizer.json or SentencePiece model

  def __post_init__(self):
    _at_least(self, train_tokenizer=0)
    if bool(self.train_tokenizer) == bool(self.tokenizer):
      raise UserError('give one of train_tokenizer and tokenizer.')


@dataclass(frozen=True)
class Data:
  """Token shards, as bam_jax.prepare writes them."""

  path: str  # "{workdir}" in it is replaced by --workdir
  sequence_length: int  # T, tokens of a training sequence
  prepare: Prepare | None = None

  def __post_init__(self):
    _at_least(self, sequence_length=1)


@dataclass(frozen=True)
class Evaluation:
  """Held-out perplexity: after every run over all of the held-out text, during it over a part."""

  batch_size: int = 16  # sequences
  tokens: int = 16_384  # of each domain, read at every `every.evaluate` steps
  domains: tuple[str, ...] = ()  # columns of the tables; empty is every domain of the data

  def __post_init__(self):
    _at_least(self, batch_size=1, tokens=1)


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
    _at_least(self, seed=0, steps=0)
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


def parse(config: Mapping) -> Recipe:
  """A recipe from plain nested mappings; UserError says what is wrong."""
  return strict.from_dict(Recipe, config, 'config')


def complete(config: Mapping) -> ConfigDict:
  """What `get_config` returns: the recipe checked and with every default filled in.

  A key that is there can be set on the command line: `--config.runs.seed.compute.dtype=bfloat16`.
  Keys keep the order in which the recipe writes them.
  """
  return _config_dict(to_dict(parse(config)))


def _config_dict(value):
  if not isinstance(value, dict):
    return tuple(value) if isinstance(value, list) else value
  return ConfigDict({key: _config_dict(item) for key, item in value.items()}, sort_keys=False)


def to_dict(config) -> dict | list | str | float | int | None:
  """Plain, JSON-ready values of any of these dataclasses; `strict.from_dict` reads them back."""
  return strict.to_dict(config)
