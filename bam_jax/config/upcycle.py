"""How dense models become a mixture."""

import math
from dataclasses import dataclass, field
from typing import Literal

from bam_jax.config import checks
from bam_jax.errors import UserError

Method = Literal['bam_kv_experts', 'bam_shared_kv', 'btx', 'sparse', 'average']


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
  capacity_factor: float = 0.0
  router_scale: float = 1.0  # routers start normal with this standard deviation over sqrt(D)
  # The rest goes beyond the paper and is off; docs/options.md says when to use which.
  # 'zero': equal gates; 'centroids': columns of length router_scale toward each source's data.
  router_init: Literal['random', 'zero', 'centroids'] = 'random'
  average: Literal['mean', 'weighted', 'first'] = 'mean'  # of the sources, where nothing is stacked
  weights: tuple[float, ...] = ()  # of the sources, in any unit, for 'weighted'
  drop_ratio: float = 0.0  # of the hidden dimensions of copied FFN experts, drawn anew
  noise: float = 0.0  # added to copied experts, in standard deviations of each array
  expert_bias: bool = False  # of the FFN experts

  def __post_init__(self):
    checks.at_least(self, num_experts=0, top_k=1, attention_top_k=0, router_scale=0)
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
    if self.expert_bias and self.method == 'average':
      raise UserError(
        "expert_bias=True has no meaning for method 'average', which has no router: leave it out."
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
    checks.fraction(self, 'drop_ratio')
    checks.at_least(self, noise=0)
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
