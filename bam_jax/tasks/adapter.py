"""A checkpoint as a model of lm-eval: log-likelihoods, rolling log-likelihoods, generated text.

A text begins with the BOS token, as documents do in training. Scoring and generation place the
parameters differently, so only one of the two is in memory: lm-eval asks for all requests of one
kind before the next.
"""

import collections
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from bam_jax.config.strict import require
from bam_jax.evaluate import comparison
from bam_jax.evaluate.scorer import Scorer
from bam_jax.generate import generator, text
from bam_jax.generate.sampling import SamplingParams
from bam_jax.parallel import sharding
from bam_jax.upcycle import growth

MAX_NEW_TOKENS = 256  # where a task gives no number: lm-eval's own default
# Options of other models' generation that are accepted, at the values that change nothing.
NEUTRAL = {'num_beams': 1, 'num_return_sequences': 1, 'repetition_penalty': 1.0, 'min_p': 0.0}

Pair = tuple[Any, list[int], list[int]]  # texts, tokens of the context and of the continuation


class Model(TemplateLM):
  """Any checkpoint: dense, average or mixture."""

  def __init__(self, path: str, options: comparison.Options = comparison.Options()):  # noqa: B008
    """Reads what the checkpoint is; its parameters are loaded by the first request.

    UserError when the checkpoint is missing.
    """
    super().__init__()
    self._path, self._options, self.batch_size = path, options, options.batch_size
    self._source = growth.open_without(path, options.without)
    self.meta, self._tokenizer = self._source.meta, self._source.tokenizer()
    self.max_length = options.window or self.meta.sequence_length
    self._loaded: Scorer | generator.Generator | None = None
    self._warned: set[str] = set()

  # Of lm-eval's models: what an empty context is, what ends a document.
  prefix_token_id = property(lambda self: self._tokenizer.bos_id)
  eot_token_id = property(lambda self: self._tokenizer.eos_id)

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
  ) -> list[int]:
    """The tokens of a text, after BOS unless `add_special_tokens` is False."""
    bos = [] if add_special_tokens is False else [self.prefix_token_id]
    return bos + self._tokenizer.encode(string)

  def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a context and of its continuation, to which the spaces between them belong.

    Those of the whole text, unless one spans the join: then each is encoded on its own, as in
    lm-eval's pull request 4055, for the tokens of the whole are not those of the context.
    """
    start = context.rstrip()
    rest = context[len(start) :] + continuation
    before, whole = self.tok_encode(start), self.tok_encode(start + rest)
    tokens = whole[len(before) :] if whole[: len(before)] == before else []
    tokens = tokens or self._tokenizer.encode(rest)
    wrong = f'The tokenizer of {self._path} has no token for {continuation!r}'
    require(tokens or not continuation, f'{wrong}, which cannot be scored: remove the task.')
    return before, tokens

  def _loglikelihood_tokens(
    self, requests: Sequence[Pair], disable_tqdm: bool = False, **kwargs: Any
  ) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation in nats, and whether greedy decoding writes it."""
    longest = max((len(context) + len(tokens) for _, context, tokens in requests), default=0)
    if longest - 1 > self.max_length:
      self._warn_once('A request exceeds the window: contexts are truncated on the left.')
    # An empty continuation has probability 1.
    answers = {(tuple(c), tuple(t)): (0.0, True) for _, c, t in requests}
    pairs = [pair for pair in answers if pair[1]]
    if pairs:
      dtype, mesh = self._options.dtype, self._options.mesh
      with tqdm(total=len(pairs), disable=disable_tqdm or None, desc='bam_jax') as progress:
        if not isinstance(self._loaded, Scorer):
          self._loaded = None  # frees the generator's memory first
          self._loaded = Scorer(self._source, dtype, mesh, self.max_length)
        answers.update(zip(pairs, self._loaded.loglikelihoods(pairs, progress.update)))
    wrong = f'{self._path} gives a log-likelihood that is not finite: its training diverged.'
    require(all(math.isfinite(value) for value, _ in answers.values()), wrong)
    return [answers[tuple(context), tuple(tokens)] for _, context, tokens in requests]

  def loglikelihood_rolling(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """Log-likelihood of each whole text in nats, without an EOS token, in lm-eval's windows."""
    pairs, owners = [], []
    for number, request in enumerate(requests):
      tokens = self._tokenizer.encode(request.args[0])
      windows = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
      for window in windows:
        pairs.append((None, *utils.make_disjoint_window(window)))
        owners.append(number)
    totals = [0.0] * len(requests)
    scored = self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)
    for owner, (value, _) in zip(owners, scored):
      totals[owner] += value
    return totals

  def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
    """The continuation of each context, up to the first of its stops or the EOS token.

    UserError for a request that requires what `generate` does not have.
    """
    batches = collections.defaultdict(list)  # by what must be equal in one
    made, seen = [], collections.Counter()
    for context, options in (request.args for request in requests):
      until, wanted, params = _gen_kwargs(options)
      max_new_tokens = min(wanted, max(1, self.max_length // 2))
      if wanted > max_new_tokens:
        self._warn_once(f'A task gets {max_new_tokens:,} new tokens, half of the window.')
      room = max(1, self.max_length - max_new_tokens)
      tokens = self.tok_encode(context)
      if len(tokens) > room:
        self._warn_once(f'A prompt exceeds {room:,} tokens: prompts are truncated on the left.')
      prompt, how = tuple(tokens[-room:]), (max_new_tokens, params)
      made.append(text.Continuation(self._tokenizer, prompt, until))
      # A prompt that is repeated gets other draws.
      batches[how].append((generator.Row(prompt, seen[how, prompt]), made[-1]))
      seen[how, prompt] += 1
    if made and not isinstance(self._loaded, generator.Generator):
      self._loaded = None  # frees the scorer's memory first
      mesh = sharding.make_mesh(self._options.mesh)
      self._loaded = generator.load(self._source, self._options.dtype, mesh)
    # None: only on a terminal.
    with tqdm(total=len(requests), disable=disable_tqdm or None, desc='bam_jax') as progress:
      for how, batch in batches.items():
        rows, started = zip(*batch)
        watch = lambda number, tokens, started=started: started[number].add(tokens)
        options = dict(seed=self._options.seed, batch_size=self.batch_size, watch=watch)
        self._loaded.generate(rows, *how, **options)
        progress.update(len(batch))
    for continuation in made:
      continuation.finish()
    return [continuation.text for continuation in made]

  def _warn_once(self, sentence: str) -> None:
    if sentence not in self._warned:
      self._warned.add(sentence)
      print(f'{self._path}: {sentence}', file=sys.stderr)


def _gen_kwargs(options: Mapping[str, Any]) -> tuple[list[str], int, SamplingParams]:
  """Stops, the maximum of new tokens, and how they are sampled."""
  left = dict(normalize_gen_kwargs(dict(options), MAX_NEW_TOKENS))
  until, max_new_tokens, sample = (left.pop(k) for k in ('until', 'max_gen_toks', 'do_sample'))
  temperature = float(left.pop('temperature', 1.0))
  top_k, top_p = left.pop('top_k', None) or 0, left.pop('top_p', None) or 1.0
  for name, value in left.items():
    neutral = value is None or value == NEUTRAL.get(name)
    require(neutral, f'A task requires {name}={value}, which bam_jax does not support.')
  drawn = sample and temperature
  params = SamplingParams(temperature, int(top_k), float(top_p)) if drawn else SamplingParams()
  return until, max_new_tokens, params
