"""Prompts continued for a reader at a terminal: one as it is written, many in batches."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from bam_jax.generate import generator, loading, programs, sampling, text


@dataclasses.dataclass(frozen=True)
class Session:
  """What all continuations have in common."""

  loaded: loading.Loaded
  options: sampling.Sampling
  max_new_tokens: int
  seed: int
  stops: tuple[str, ...]  # texts that end a continuation
  output: TextIO

  def run(self, prompts: Sequence[str], num_samples: int, batch_size: int) -> list[dict[str, Any]]:
    """Continues each prompt `num_samples` times; returns the rows of `--json`."""
    tokenizer = self.loaded.tokenizer
    ids = text.prompt_tokens(tokenizer, prompts)
    self._warn(max(map(len, ids)))
    rows = [generator.Row(tokens, i) for tokens in ids for i in range(num_samples)]
    made = [text.Continuation(tokenizer, row.prompt, self.stops) for row in rows]
    heads = [(prompt, i) for prompt in prompts for i in range(num_samples)]
    stream = len(rows) == 1
    if stream:
      self._say(prompts[0])

    def watch(number: int, tokens: list[int]) -> bool:
      shown = made[number].add(tokens)
      if stream:
        self._say(shown)
      return made[number].stopped

    self.loaded.generator.generate(
      rows,
      self.max_new_tokens,
      self.options,
      seed=self.seed,
      batch_size=batch_size,
      every=1 if stream else programs.WRITES,
      watch=watch,
    )
    ends = [one.finish() for one in made]
    if stream:
      self._say(f'{ends[0]}\n')
    facts = []
    for (prompt, sample), one in zip(heads, made):
      if not stream:
        self._say(f'{_title(prompt, sample, num_samples)}\n{one.text}\n\n')
      facts.append(
        {
          'prompt': prompt,
          'sample': sample,
          'text': one.text,
          'tokens': one.tokens,
          'reason': self._reason(one),
        }
      )
    return facts

  def _reason(self, one: text.Continuation) -> str:
    if one.stopped:
      return 'stop'
    return 'length' if len(one.tokens) == self.max_new_tokens else 'end'

  def _warn(self, longest: int) -> None:
    trained = self.loaded.meta.sequence_length
    if longest + self.max_new_tokens > trained:
      print(
        f'The longest prompt has {longest:,} tokens and may get {self.max_new_tokens:,} more; the '
        f'model was trained on sequences of {trained:,}, and may ramble past them.',
        file=sys.stderr,
      )

  def _say(self, words: str) -> None:
    self.output.write(words)
    self.output.flush()


def _title(prompt: str, sample: int, num_samples: int) -> str:
  line = ' '.join(prompt.split())
  line = line if len(line) <= 72 else line[:71] + '…'
  return f'== {line}' + (f' ({sample + 1} of {num_samples})' if num_samples > 1 else '')
