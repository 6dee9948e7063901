"""How dense models become a mixture."""

import math
from dataclasses import dataclass, field
from typing import Literal

from bam_jax.config.strict import Count, NonNegative, PositiveInt, Section

Method = Literal['bam_kv_experts', 'bam_shared_kv', 'btx', 'sparse', 'average']


@dataclass(frozen=True)
class Upcycle(Section):
  """Mix dense runs into one model; paper section 3."""

  sources: tuple[str, ...] = field(metadata={'key': 'from'})  # names of dense runs, experts' order
  method: Method
  # Experts of the mixture; 0: one for each source. If above the sources: adds copies of the first.
  num_experts: Count = 0
  top_k: PositiveInt = 1  # of the FFN experts
  attention_top_k: Count = 0  # of the attention experts; 0 is soft
  renormalize: bool = False  # divide the k gates by their sum
  capacity_factor: NonNegative = 0.0  # of the FFN experts' buffers; 0 is dropless
  # Standard deviation of random routers, times sqrt(D); of fitted ones see docs/options.md.
  router_scale: NonNegative = 1.0
  # The rest goes beyond the paper and is off by default: docs/options.md.
  router_input: Literal['token', 'prefix'] = 'token'  # or the mean of the document so far
  router_memory: Count = 0  # of 'prefix': reaches back about so many tokens; 0: all alike
  # 'zero': equal gates; 'centroids' and 'ridge': fitted to each source's data.
  router_init: Literal['random', 'zero', 'centroids', 'ridge'] = 'random'
  average: Literal['mean', 'weighted', 'first'] = 'mean'  # of the sources, if not stacked
  weights: tuple[float, ...] = ()  # of the sources, in any unit, for 'weighted'
  # 'fold': each source's norm before a part goes into its own experts' matrices.
  norms: Literal['mean', 'fold'] = 'mean'
  expert_bias: bool = False  # of the FFN experts
  # Keep each source's embeddings as differences of this rank, at most D/8, from the average.
  embedding_rank: Count = 0

  def check(self):
    sources, weights, num_experts = list(self.sources), list(self.weights), self.num_experts
    self.require(len(set(sources)) == len(sources), f'from={sources} names a source twice.')
    sparse, average = self.method == 'sparse', self.method == 'average'
    wanted = 'exactly one source' if sparse else 'at least two sources'
    found = f'from={sources} has {len(sources)}: method {self.method!r}'
    fits = len(sources) == 1 if sparse else len(sources) >= 2
    self.require(fits, f'{found} requires {wanted}.')
    few = f'{num_experts=} is too few for {self.method!r}: set the number of copies.'
    self.require(num_experts or not sparse, few)
    few = f'{num_experts=} is below the {len(sources)} sources of from={sources}'
    enough = not num_experts or num_experts >= len(sources)
    self.require(enough, f'{few}: each is an expert.')
    attention = self.method in ('bam_kv_experts', 'bam_shared_kv')
    zero = self.router_init == 'zero'
    fold = self.norms == 'fold'
    for key, given, where in (
      ('num_experts', average and num_experts > len(sources), 'which has no experts'),
      ('router_init', average and (zero or self.fits_routers), 'which has no router'),
      ('router_input', average and self.router_input != 'token', 'which has no router'),
      ('norms', fold and average, 'which has no experts'),
      ('norms', fold and sparse, 'with a single source'),
      ('embedding_rank', average and self.embedding_rank, 'which has no experts'),
      ('embedding_rank', sparse and self.embedding_rank, 'with a single source'),
      ('expert_bias', average and self.expert_bias, 'which has no router'),
      ('attention_top_k', self.attention_top_k and not attention, 'which has no attention experts'),
      ('router_init', sparse and self.fits_routers, 'with a single source'),
    ):
      value = f'{key}={getattr(self, key)!r} has no effect with method {self.method!r}'
      self.require(not given, f'{value}, {where}: remove it.')
    scaled = f"router_scale={self.router_scale} has no effect with router_init='zero': remove it."
    self.require(not zero or self.router_scale == 1, scaled)
    wrong = f"router_init={self.router_init!r} reads averaged norms: set norms='mean', or 'random'."
    self.require(not (fold and self.fits_routers), wrong)
    unused = f"{weights=} has no effect with average={self.average!r}: set average='weighted'."
    self.require(not weights or self.average == 'weighted', unused)
    fits = self.average != 'weighted' or len(weights) == len(sources)
    need = f"average='weighted' requires one for each of {sources}"
    self.require(fits, f'{weights=} has {len(weights)} numbers: {need}.')
    for weight in weights:
      self.require(0 < weight < math.inf, f'{weights=} has {weight}, which is not positive.')

  @property
  def fits_routers(self) -> bool:
    """Whether routers are made from the sources' data."""
    return self.router_init in ('centroids', 'ridge')

  @property
  def experts(self) -> int:
    """Experts of the mixture."""
    return self.num_experts or len(self.sources)

  @property
  def copies(self) -> range:
    """Indices of the experts that are copies of the first source's."""
    return range(len(self.sources), self.experts)


@dataclass(frozen=True)
class Grow(Section):
  """Add a dense run to a mixture, as its last expert."""

  mixture: str = field(metadata={'key': 'from'})  # names of runs
  dense: str = field(metadata={'key': 'with'})
  router_init: Literal['random', 'zero'] = 'random'  # of the new columns
  freeze_old: bool = False  # train routers and the new expert alone
