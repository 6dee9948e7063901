"""What attention and FFN need to know of the tokens at hand beside their embeddings."""

from collections.abc import Callable
from typing import NamedTuple

import jax


class Tokens(NamedTuple):
  """Of tokens BT, this device's own or those of its group."""

  turn: Callable  # rotary embedding at their positions
  attend: Callable  # the attention kernel for their segments
  real_BT: jax.Array  # false on padding, which visits no expert
  counted_BT: jax.Array  # true where real and this device's own: each token counts once
  # (key, value), both BTGK, of each set of keys and values in turn -> those that `attend` is given
  remember: Callable = lambda key_BTGK, value_BTGK: (key_BTGK, value_BTGK)
