"""Text around the model: prompts out of files, and tokens to text as they come."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bam_jax.config.strict import require
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.errors import UserError
from bam_jax.prepare import documents

CONTEXT = 8  # tokens before new ones that decide how they are spelled: whether a space comes first
REPLACEMENT = '\ufffd'  # what a tokenizer makes of bytes that are not a character, or half of one
MAX_HALF = 8 * CONTEXT  # of them at the end: some tokenizers make one of each byte of a run


def read_prompts(path: str) -> list[str]:
  """The lines of a text file, or `prompt` of each line of a .jsonl; blank lines are left out.

  UserError names the file, or its line, that cannot be read.
  """
  file = Path(path)
  kind = documents.extension(file)
  require(kind, f'--prompts={path} must end in one of {", ".join(documents.EXTENSIONS)}.')
  try:
    prompts = [document.text for document in documents.read_documents(file, 'prompt')]
  except UserError as error:  # of a flag that only commands with other texts have
    raise UserError(str(error).replace(', or choose --text_field', '')) from None
  if kind in documents.TEXT:
    prompts = [line.removesuffix('\r') for line in prompts[0].split('\n') if line.strip()]
  require(prompts, f'--prompts={path} holds no prompt: write one on each line.')
  return prompts


class Continuation:
  """The text of one row, as its tokens come."""

  def __init__(
    self,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    stops: Sequence[str] = (),
    show: Callable[[str], Any] = lambda text: None,
  ):
    """Takes the prompt's tokens, texts at the first of which it ends, and who is shown new text."""
    self.text = ''  # what is certain so far: no half character, nothing that may begin a stop
    self.tokens: list[int] = []  # all of them, to the one that completes a stop
    self.stopped = False  # whether a stop was found, where `text` ends
    self._tokenizer, self._show = tokenizer, show
    self._stops = [stop for stop in stops if stop]
    self._spelled = ''  # all that is spelled, stops or not
    self._look_from(list(prompt))

  def add(self, tokens: Sequence[int]) -> bool:
    """Takes new tokens, none after a stop; returns whether there was one."""
    for token in tokens:
      if not self.stopped:
        self.tokens.append(token)
        self._window.append(token)
        self._spell(last=False)
    return self.stopped

  def finish(self) -> None:
    """Shows what was held back, now that no more tokens come."""
    if not self.stopped:
      self._spell(last=True)

  def _look_from(self, tokens: list[int]) -> None:
    """Makes the last tokens the window, if it can be from where a character begins."""
    windows = [tokens[-size:] for size in range(CONTEXT, CONTEXT + 4)]
    texts = [self._tokenizer.decode(window) for window in windows]
    whole = (n for n, text in enumerate(texts) if not text.startswith(REPLACEMENT))
    self._window = windows[number := next(whole, 0)]
    self._seen = len(texts[number])  # characters of the window that are spelled

  def _spell(self, last: bool) -> None:
    """Spells what the window allows, and shows what of it cannot become a stop."""
    text = self._tokenizer.decode(self._window)
    half = len(text) - len(text.rstrip(REPLACEMENT))
    half = 0 if last or half > MAX_HALF else half
    self._spelled += text[self._seen : len(text) - half]
    self._seen = max(self._seen, len(text) - half)
    if not half and len(self._window) > 4 * CONTEXT:
      self._look_from(self._window)
    found = [at for at in map(self._spelled.find, self._stops) if at >= 0]
    self.stopped = bool(found)
    end = min(found, default=len(self._spelled))
    if not found and not last:
      end -= max((_begun(self._spelled, stop) for stop in self._stops), default=0)
    self._show(self._spelled[len(self.text) : end])
    self.text = self._spelled[:end]


def _begun(text: str, stop: str) -> int:
  """The length of the longest beginning of `stop` that `text` ends with."""
  return max((n for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
