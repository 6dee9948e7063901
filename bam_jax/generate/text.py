"""Text around the model: prompts to tokens, and tokens to text as they come."""

from collections.abc import Sequence

from bam_jax.data.documents import DOCUMENT_BYTES
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.errors import UserError
from bam_jax.files import json_file

CONTEXT = 8  # tokens before new ones that decide how they are spelled: whether a space comes first
REPLACEMENT = '\ufffd'  # what a tokenizer makes of bytes that are not a character, or half of one
PROMPTS_BYTES = 2**28  # of a file of prompts, at most
MAX_HALF = 3  # bytes of half a character


def prompt_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
  """BOS and the tokens of each text, as documents begin in training."""
  return [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_batch(list(texts))]


def read_prompts(path: str) -> list[str]:
  """The prompts in a file: JSON lines with the key `prompt` if it ends in .jsonl, else one a line.

  Raises:
    UserError: the file, or a line of it, cannot be read.
  """
  try:
    with open(path, 'rb') as file:
      content = file.read(PROMPTS_BYTES + 1)
  except OSError as error:
    raise UserError(f'--prompts={path} cannot be read: {error.strerror}.') from error
  if len(content) > PROMPTS_BYTES:
    raise UserError(f'--prompts={path} is larger than {PROMPTS_BYTES >> 20} MiB: split the file.')
  lines = content.split(b'\n')
  prompts = []
  for number, line in enumerate(lines, 1):
    where = f'{path}:{number}'
    if len(line) > DOCUMENT_BYTES:
      raise UserError(f'{where} is larger than {DOCUMENT_BYTES >> 20} MiB: shorten the prompt.')
    try:
      text = line.decode('utf-8-sig' if number == 1 else 'utf-8').removesuffix('\r')
    except UnicodeDecodeError:
      raise UserError(f'{where} is not UTF-8: convert the file.') from None
    if text.strip():
      prompts.append(_json_prompt(where, text) if path.endswith('.jsonl') else text)
  if not prompts:
    raise UserError(f'--prompts={path} holds no prompt: write one on each line.')
  return prompts


def _json_prompt(where: str, line: str) -> str:
  try:
    fact = json_file.loads(line)
  except ValueError as error:
    raise UserError(f'{where} is not JSON ({error}): fix the line.') from None
  prompt = fact.get('prompt') if isinstance(fact, dict) else None
  if not isinstance(prompt, str):
    raise UserError(f'{where} has no text under the key "prompt": fix the line.')
  try:
    prompt.encode()
  except UnicodeEncodeError:  # half of an escaped pair
    raise UserError(f'{where} is not UTF-8: convert the file.') from None
  return prompt


class Continuation:
  """The text of one row, as its tokens come.

  Attributes:
    text: what is certain of it so far: no half character, nothing that may begin a stop.
    tokens: all of them, to the one that completes a stop.
    stopped: whether a stop was found, where `text` ends.
  """

  def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()):
    """Takes the prompt's tokens, and texts at the first of which the continuation ends."""
    self.text = ''
    self.tokens: list[int] = []
    self.stopped = False
    self._tokenizer = tokenizer
    self._stops = [stop for stop in stops if stop]
    self._spelled = ''  # all that is spelled, stops or not
    self._window = list(prompt[-CONTEXT:])
    self._seen = len(tokenizer.decode(self._window))  # characters of the window

  def add(self, tokens: Sequence[int]) -> str:
    """Takes new tokens, none after a stop; returns what is new of the text."""
    shown = ''
    for token in tokens:
      if self.stopped:
        break
      self.tokens.append(token)
      self._window.append(token)
      shown += self._show(last=False)
    return shown

  def finish(self) -> str:
    """Returns what was held back, now that no more tokens come."""
    return '' if self.stopped else self._show(last=True)

  def _show(self, last: bool) -> str:
    """Spells what the window allows, and returns what of it cannot become a stop."""
    self._spelled += self._spell(last)
    found = [at for at in map(self._spelled.find, self._stops) if at >= 0]
    self.stopped = bool(found)
    end = min(found, default=len(self._spelled))
    if not found and not last:
      end -= max((_begun(self._spelled, stop) for stop in self._stops), default=0)
    shown = self._spelled[len(self.text) : end]
    self.text += shown
    return shown

  def _spell(self, last: bool) -> str:
    text = self._tokenizer.decode(self._window)
    end = len(text)
    if not last:
      end -= min(MAX_HALF, len(text) - len(text.rstrip(REPLACEMENT)))
    new = text[self._seen : end]
    self._seen = max(self._seen, end)
    if end == len(text) and len(self._window) > 4 * CONTEXT:
      self._window = self._window[-CONTEXT:]
      self._seen = len(self._tokenizer.decode(self._window))
    return new


def _begun(text: str, stop: str) -> int:
  """The length of the longest beginning of `stop` that `text` ends with."""
  lengths = range(min(len(stop) - 1, len(text)), 0, -1)
  return next((length for length in lengths if text.endswith(stop[:length])), 0)
