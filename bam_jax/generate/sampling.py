"""The next token from its logits: the largest, or drawn after temperature, top-k and top-p.

Nothing is approximate: top-k keeps k words, of equal logits those with lower ids; top-p keeps a
word if all that are more probable have less than `top_p` of the mass, equals alike.

Legend: B batch, V vocabulary, N candidates.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bam_jax.config.strict import require


@dataclass(frozen=True)
class SamplingParams:
  """How tokens are chosen."""

  temperature: float = 0.0  # logits are divided by it; 0 is greedy decoding
  top_k: int = 0  # candidates; 0 is all words
  top_p: float = 1.0  # the probability mass of the candidates, after top-k

  def __post_init__(self):
    finite = self.temperature == 0 or 1e-30 <= self.temperature < math.inf  # as are logits over it
    require(finite, f'--temperature={self.temperature} must be 0, or at least 1e-30.')
    require(self.top_k >= 0, f'--top_k={self.top_k} is negative: set 0 for all tokens, or more.')
    require(0 < self.top_p <= 1, f'--top_p={self.top_p} must be above 0 and at most 1.')
    read = self.temperature or not (self.top_k or self.top_p < 1)
    require(read, '--top_k and --top_p have no effect at temperature 0: set --temperature=1.')

  def static(self) -> tuple[bool, int, bool]:
    """What a program is compiled for: whether it draws, top-k, and whether it applies top-p."""
    return self.temperature > 0, self.top_k, self.top_p < 1


def sample(
  logits_BV: jax.Array,
  keys_B: jax.Array,
  static: tuple[bool, int, bool],
  temperature: jax.Array,
  top_p: jax.Array,
) -> jax.Array:
  """One word for each row, int32 (B,); `static` is that of `SamplingParams`.

  Logits are float32, minus infinity for words that are not to be chosen; `temperature` is above 0.
  """
  draws, top_k, use_top_p = static
  if not draws:
    return jax.lax.top_k(logits_BV, 1)[1][:, 0]  # on CPU jnp.argmax takes ten times as long
  logits_BN, words_BN = logits_BV / temperature, None
  if top_k:
    logits_BN, words_BN = jax.lax.top_k(logits_BN, min(top_k, logits_BN.shape[1]))
  if use_top_p:
    logits_BN = mask_top_p(logits_BN, top_p)
  drawn_B = jax.vmap(jax.random.categorical)(keys_B, logits_BN)
  return jnp.take_along_axis(words_BN, drawn_B[:, None], axis=1)[:, 0] if top_k else drawn_B


def mask_top_p(logits_BN: jax.Array, top_p: jax.Array) -> jax.Array:
  """Logits, those outside of top-p minus infinity; nucleus sampling, arXiv 1904.09751.

  The least probability that stays is found by bisection over the bits of a float32, whose order is
  that of the numbers: sorting 256,000 words takes CPUs twenty times as long.
  """
  probabilities_BN = jax.nn.softmax(logits_BN)
  bits_BN = jax.lax.bitcast_convert_type(probabilities_BN, jnp.int32)

  def set_bit(number, least_B):
    tried_B = least_B | (1 << (30 - number))
    mass_B = jnp.sum(jnp.where(bits_BN >= tried_B[:, None], probabilities_BN, 0), axis=1)
    return jnp.where(mass_B >= top_p, tried_B, least_B)

  least_B = jax.lax.fori_loop(0, 31, set_bit, jnp.zeros(logits_BN.shape[0], jnp.int32))
  return jnp.where(bits_BN >= least_B[:, None], logits_BN, -jnp.inf)
