"""A checkpoint as lm-eval's model: log-likelihoods, rolling ones, and text up to a stop.

A text begins with the begin token, as documents do in training. Requests go in buckets of similar
length to programs that are compiled once for each, and come back in the order they were asked in.
What scores and what writes place the parameters differently: one of the two is in memory at a time,
and lm-eval asks for all of one kind before the next.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from bam_jax import checkpoint as checkpoint_lib
from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.evaluate.scorer import Scorer
from bam_jax.generate import generator, loading, sampling, text
from bam_jax.parallel import sharding

NAME = 'bam_jax'  # of the model, for lm-eval
NEW_TOKENS = 256  # of a continuation, where a task gives no number: lm-eval's own
# What other models' generation can do besides, at the values that change nothing.
NEUTRAL = {'num_beams': 1, 'num_return_sequences': 1, 'repetition_penalty': 1.0, 'min_p': 0.0}

Pair = tuple[Any, list[int], list[int]]  # texts, tokens of the context and of the continuation


@register_model(NAME)
class Model(TemplateLM):
  """Any checkpoint: dense, average or mixture."""

  def __init__(
    self,
    checkpoint: str,
    dtype: str | None = None,
    batch_size: int | str | None = None,
    max_length: int | None = None,
    seed: int = 0,
    max_batch_size: int | None = None,
    device: str | None = None,
    **axes: int,
  ):
    """Names a checkpoint; it is loaded by the first request.

    Args:
      checkpoint: a run, one of its steps, or a conversion.
      dtype: 'float32' or 'bfloat16'; default: float32 on CPU, bfloat16 elsewhere.
      batch_size: rows on the devices at once; default, and 'auto': 16.
      max_length: tokens that are read at once; default: what the model was trained at.
      seed: of draws, in tasks that sample.
      max_batch_size: goes unread: lm-eval's command line passes it.
      device: likewise; JAX_PLATFORMS chooses.
      **axes: of the mesh: data=2, fsdp=4.

    Raises:
      UserError: there is no such checkpoint, or an argument is no such thing.
    """
    super().__init__()
    del max_batch_size, device
    self._path, self._seed = checkpoint, seed
    self._dtype = dtype or ('float32' if jax.default_backend() == 'cpu' else 'bfloat16')
    if self._dtype not in ('float32', 'bfloat16'):
      raise UserError(f'dtype={dtype} is none of float32 and bfloat16.')
    self.batch_size = 16 if batch_size in (None, 'auto') else _whole('batch_size', batch_size)
    wrong = next((axis for axis in axes if axis not in sharding.AXES), None)
    if wrong:
      known = 'checkpoint, dtype, max_length, seed'
      raise UserError(f'{wrong} is none of {known}, {", ".join(sharding.AXES)}: mend --model_args.')
    self._mesh = config.Mesh(**{axis: _whole(axis, size) for axis, size in axes.items()})
    meta = checkpoint_lib.read_meta(checkpoint)
    self.words = checkpoint_lib.open_tokenizer(checkpoint, meta)
    self.max_length = (
      meta.sequence_length if max_length is None else _whole('max_length', max_length)
    )
    self._loaded: Any = None  # a Scorer, or a Generator
    self._told: set[str] = set()

  def get_model_info(self) -> dict[str, Any]:
    """What lm-eval writes beside its results."""
    meta = checkpoint_lib.read_meta(self._path)
    return {
      'run': meta.run,
      'step': meta.step,
      'method': meta.method,
      'tokenizer_hash': meta.tokenizer_hash,
      'model_dtype': self._dtype,
      'mesh': config.to_dict(self._mesh),
      'max_length': self.max_length,
    }

  @property
  def eot_token_id(self) -> int:
    return self.words.eos_id

  @property
  def prefix_token_id(self) -> int:
    """What a document begins with, and what an empty context is."""
    return self.words.bos_id

  @property
  def tokenizer_name(self) -> str:
    return self.words.hash

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
  ) -> list[int]:
    """The tokens of a text; unless told not to, begins with the begin token."""
    del kwargs
    begin = [] if add_special_tokens is False else [self.words.bos_id]
    return begin + self.words.encode(string)

  def loglikelihood(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[tuple[float, bool]]:
    """Natural logarithm of each continuation's likelihood, and whether greedy decoding gives it."""
    pairs = [self._pair(*one.args) for one in requests]
    return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

  def _pair(self, context: str, continuation: str) -> Pair:
    if context:
      return ((context, continuation), *self._encode_pair(context, continuation))
    return ((context, continuation), [self.prefix_token_id], self.words.encode(continuation))

  def _loglikelihood_tokens(
    self, requests: Sequence[Pair], disable_tqdm: bool = False, **kwargs: Any
  ) -> list[tuple[float, bool]]:
    del kwargs
    most = max((len(context) + len(tokens) for _, context, tokens in requests), default=0)
    if most - 1 > self.max_length:
      self._tell(
        'request',
        f'A request has {most:,} tokens, and the model reads {self.max_length:,}: contexts lose '
        'their left ends.',
      )
    asked = {(tuple(c), tuple(t)): (0.0, True) for _, c, t in requests}  # what is empty is certain
    pairs = [pair for pair in asked if pair[1]]
    if pairs:
      with _bar(len(pairs), disable_tqdm) as bar:
        asked.update(zip(pairs, self._scorer().loglikelihoods(pairs, bar.update)))
    if not all(math.isfinite(value) for value, _ in asked.values()):
      raise UserError(
        f'{self._path} gives a request no finite likelihood: its parameters are damaged, or its '
        'training diverged.'
      )
    return [asked[tuple(context), tuple(tokens)] for _, context, tokens in requests]

  def loglikelihood_rolling(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """Natural logarithm of each whole text's likelihood, without an end token.

    The windows are lm-eval's: each token is scored once; of a text longer than one, the last window
    reaches back as far as the model reads, where those of `evaluate --data` begin a stride apart.
    """
    pieces: list[Pair] = []
    owners: list[int] = []
    for number, one in enumerate(requests):
      tokens = self.words.encode(one.args[0])
      windows = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
      cut = [(None, *utils.make_disjoint_window(window)) for window in windows]
      pieces += cut
      owners += [number] * len(cut)
    totals = [0.0] * len(requests)
    scored = self._loglikelihood_tokens(pieces, disable_tqdm=disable_tqdm)
    for owner, (value, _) in zip(owners, scored):
      totals[owner] += value
    return totals

  def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
    """The continuation of each context, up to the first of its stops or the end token.

    Of `gen_kwargs` this reads `until`, `max_gen_toks` and its other names, `do_sample`,
    `temperature`, `top_k` and `top_p`; UserError for another that would change the text.
    """
    asked: dict[tuple, list[int]] = {}
    stops: list[tuple[str, ...]] = []
    for number, one in enumerate(requests):
      ends, most, options = _wanted(one.args[1])
      stops.append(ends)
      asked.setdefault((self._room(most), options), []).append(number)
    written = [''] * len(requests)
    with _bar(len(requests), disable_tqdm) as bar:
      for (most, options), numbers in asked.items():
        rows = self._rows([requests[number].args[0] for number in numbers], most)
        wanted = [stops[number] for number in numbers]
        for number, words in zip(numbers, self._write(rows, most, options, wanted)):
          written[number] = words
        bar.update(len(numbers))
    return written

  def _write(
    self,
    rows: Sequence[generator.Row],
    most: int,
    options: sampling.Sampling,
    stops: Sequence[tuple[str, ...]],
  ) -> list[str]:
    made = [text.Continuation(self.words, row.prompt, ends) for row, ends in zip(rows, stops)]

    def watch(number: int, tokens: list[int]) -> bool:
      made[number].add(tokens)
      return made[number].stopped

    self._generator().generate(
      rows, most, options, seed=self._seed, batch_size=self.batch_size, watch=watch
    )
    for one in made:
      one.finish()
    return [one.text for one in made]

  def _rows(self, contexts: Sequence[str], most: int) -> list[generator.Row]:
    """Prompts cut from the left; one that comes again gets draws of its own."""
    rows: list[generator.Row] = []
    seen: dict[tuple[int, ...], int] = {}
    room = max(1, self.max_length - most)
    for context in contexts:
      tokens = self.tok_encode(context)
      if len(tokens) > room:
        self._tell(
          'prompt',
          f'A prompt has {len(tokens):,} tokens and there is room for {room:,} beside {most:,} new '
          'ones: prompts lose their left ends.',
        )
      prompt = tuple(tokens[-room:])
      seen[prompt] = seen.get(prompt, -1) + 1
      rows.append(generator.Row(prompt, seen[prompt]))
    return rows

  def _room(self, most: int) -> int:
    """New tokens, at most half of what the model reads at once."""
    half = max(1, self.max_length // 2)
    if most > half:
      self._tell(
        'room',
        f'A task asks for {most:,} new tokens, and the model reads {self.max_length:,} at once: it '
        f'gets {half:,}.',
      )
    return min(most, half)

  def _scorer(self) -> Scorer:
    return self._load(
      Scorer,
      lambda: Scorer(self._path, self._dtype, self._mesh, self.batch_size, self.max_length),
    )

  def _generator(self) -> generator.Generator:
    mesh = sharding.make_mesh(self._mesh)
    make = lambda: loading.load(self._path, self._dtype, mesh).generator
    return self._load(generator.Generator, make)

  def _load(self, kind: type, make: Callable[[], Any]) -> Any:
    if not isinstance(self._loaded, kind):
      self._loaded = None  # before the other takes its room
      self._loaded = make()
    return self._loaded

  def _tell(self, what: str, sentence: str) -> None:
    """Says once what a reader of the results should know of `what`."""
    if what not in self._told:
      self._told.add(what)
      print(f'{self._path}: {sentence}', file=sys.stderr)


def _wanted(options: Mapping[str, Any]) -> tuple[tuple[str, ...], int, sampling.Sampling]:
  """Stops, new tokens at most, and how they are drawn."""
  left: dict[str, Any] = dict(normalize_gen_kwargs(dict(options), NEW_TOKENS))
  ends, most, drawn = tuple(left.pop('until')), left.pop('max_gen_toks'), left.pop('do_sample')
  temperature = left.pop('temperature', None)
  top_k, top_p = left.pop('top_k', None) or 0, left.pop('top_p', None) or 1.0
  for name, value in left.items():
    if value is not None and value != NEUTRAL.get(name):
      raise UserError(f'A task asks for generation with {name}={value}, which {NAME} does not do.')
  if not drawn or temperature == 0:
    return ends, most, sampling.Sampling()
  temperature = 1.0 if temperature is None else float(temperature)
  return ends, most, sampling.Sampling(temperature, int(top_k), float(top_p))


def _bar(total: int, disable: bool) -> tqdm:
  """Progress, at a terminal."""
  return tqdm(total=total, disable=disable or None, desc=NAME)


def _whole(name: str, value: Any) -> int:
  if not str(value).isdigit() or not int(value):
    raise UserError(f'{name}={value} is no number above 0: mend it.')
  return int(value)
