"""How dense models become a mixture."""

import math
from dataclasses import dataclass, field
from typing import Literal

from bam_jax.config.strict import Count, Fraction, NonNegative, PositiveInt, Section

Method = Literal['bam_kv_experts', 'bam_shared_kv', 'btx', 'sparse', 'average']


@dataclass(frozen=True)
class Upcycle(Section):
  """Mix dense runs into one model; paper section 3."""

  sources: tuple[str, ...] = field(metadata={'key': 'from'})  # names of dense runs, experts' order
  method: Method
  # Experts of the mixture; 0 is one for each source. More than the sources: copies of the first.
  num_experts: Count = 0
  top_k: PositiveInt = 1  # of the FFN experts
  attention_top_k: Count = 0  # of the attention experts; 0 is soft
  renormalize: bool = False  # divide the k gates by their sum
  capacity_factor: float = 0.0  # of the FFN experts' buffers; 0 is dropless
  router_scale: NonNegative = 1.0  # standard deviation of new routers, times sqrt(D)
  # The rest goes beyond the paper and is off; docs/options.md says when to use which.
  # 'zero': equal gates; 'centroids': columns of length router_scale toward each source's data.
  router_init: Literal['random', 'zero', 'centroids'] = 'random'
  average: Literal['mean', 'weighted', 'first'] = 'mean'  # of the sources, where nothing is stacked
  weights: tuple[float, ...] = ()  # of the sources, in any unit, for 'weighted'
  drop_ratio: Fraction = 0.0  # of the hidden dimensions of copied FFN experts, drawn anew
  noise: NonNegative = 0.0  # added to copied experts, in standard deviations of each array
  expert_bias: bool = False  # of the FFN experts

  def check(self):
    sources, method, num_experts = list(self.sources), self.method, self.num_experts
    self.require(len(set(sources)) == len(sources), f'from={sources} names a source twice.')
    has = f'from={sources} has {len(sources)}: method {method!r} needs'
    if method == 'sparse':
      self.require(len(sources) == 1, f'{has} exactly one source.')
      self.require(
        num_experts, "num_experts=0 is not a size for method 'sparse': say how many copies."
      )
    else:
      self.require(len(sources) >= 2, f'{has} at least two sources.')
    self.require(
      not num_experts or num_experts >= len(sources),
      f'{num_experts=} is below the {len(sources)} sources of from={sources}: each is an expert.',
    )
    if method == 'average':
      where = "for method 'average', which has no experts"
      self._refuse('num_experts', num_experts > len(sources), where)
      where = "for method 'average', which has no router"
      self._refuse('router_init', self.router_init != 'random', where)
      self._refuse('expert_bias', self.expert_bias, where)
    if method not in ('bam_kv_experts', 'bam_shared_kv'):
      where = f'for method {method!r}, which has no attention experts'
      self._refuse('attention_top_k', self.attention_top_k, where)
    if method == 'sparse':
      where = "for method 'sparse', whose one source has one centroid"
      self._refuse('router_init', self.router_init == 'centroids', where)
    if not self.copies:
      where = f'for {method!r} of {len(sources)} sources, none of whose experts is a copy'
      self._refuse('drop_ratio', self.drop_ratio, where)
      self._refuse('noise', self.noise, where)
    if self.router_init == 'zero':
      self._refuse('router_scale', self.router_scale != 1, "with router_init='zero'")
    self._check_weights()

  def _check_weights(self):
    weights, sources = list(self.weights), list(self.sources)
    if self.average != 'weighted':
      self._refuse('weights', weights, f"with average={self.average!r}, only with 'weighted'")
      return
    self.require(
      len(weights) == len(sources),
      f"{weights=} has {len(weights)} numbers: average='weighted' needs one for each of {sources}.",
    )
    for weight in weights:
      self.require(0 < weight < math.inf, f'{weights=} has {weight}, which is not positive.')

  def _refuse(self, key: str, given: object, where: str) -> None:
    self.require(not given, f'{key}={getattr(self, key)!r} has no meaning {where}: leave it out.')

  @property
  def experts(self) -> int:
    """Experts of the mixture."""
    return self.num_experts or len(self.sources)

  @property
  def copies(self) -> range:
    """Numbers of the experts that are copies of the first source's."""
    return range(len(self.sources), self.experts)
