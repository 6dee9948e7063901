"""One small interface over Hugging Face `tokenizer.json` and SentencePiece `.model` files."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, trainers

from bam_jax.errors import UserError
from bam_jax.files import folders

HUGGING_FACE_FILE = 'tokenizer.json'
SENTENCEPIECE_FILE = 'tokenizer.model'

# In order of preference; a token in both lists may begin and end documents alike.
BOS_TOKENS = (
  '<|bos|>',
  '<BOS_TOKEN>',
  '<|begin_of_text|>',
  '<s>',
  '<bos>',
  '[BOS]',
  '<|startoftext|>',
  '<|endoftext|>',
)
EOS_TOKENS = (
  '<|eos|>',
  '<|END_OF_TURN_TOKEN|>',
  '<EOS_TOKEN>',
  '<|end_of_text|>',
  '</s>',
  '<eos>',
  '[EOS]',
  '<|endoftext|>',
)
# 256 bytes, beginning and end: what byte-level BPE needs before its first merge.
SMALLEST_VOCAB = 258
FILE_BYTES = 2**28  # at most, of a tokenizer's file
BATCH_BYTES = 2**22  # encoded at a time: each takes some 100 bytes, until all are encoded
LARGEST_VOCAB = 2**20  # to train; the trainer makes room for all of it beforehand


def read_file(path: Path | epath.Path) -> bytes:
  """A tokenizer's file, unparsed; UserError when it cannot be read or has over FILE_BYTES."""
  try:
    with path.open('rb') as file:
      content = file.read(FILE_BYTES + 1)
  except OSError as error:
    raise UserError(f'The tokenizer {path} cannot be read: {error.strerror or error}.') from error
  if len(content) > FILE_BYTES:
    raise UserError(f'{path} is larger than {FILE_BYTES >> 20} MiB: it is no tokenizer.')
  return content


class Tokenizer:
  """Text to token ids and back.

  Documents are plain text: a special token's name inside a text is spelled out like any other
  characters, it never becomes the special id, so no document can forge its own end.

  Attributes:
    vocab_size: one more than the largest id.
    bos_token: the name of the token that begins every document.
    eos_token: the name of the token that ends every document.
    bos_id: its id.
    eos_id: its id.
    hash: SHA-256 of the tokenizer's file, in hex.
    file_name: `tokenizer.json` or `tokenizer.model`, the name under which `save` writes it.
  """

  def __init__(
    self, content: bytes, file_name: str, bos_token: str | None = None, eos_token: str | None = None
  ):
    """Reads a tokenizer from its file's bytes.

    Args:
      content: the bytes of a `tokenizer.json` or of a SentencePiece model.
      file_name: `tokenizer.json` or `tokenizer.model`; says which of the two it is.
      bos_token: the token that begins documents, or None to look for a well-known one.
      eos_token: the token that ends documents, or None to look for a well-known one.

    Raises:
      UserError: the bytes are no such file, or the tokens are not in its vocabulary.
    """
    kinds = {HUGGING_FACE_FILE: _HuggingFace, SENTENCEPIECE_FILE: _SentencePiece}
    self._content = content
    self._backend = kinds[file_name](content)
    self.file_name = file_name
    self.hash = hashlib.sha256(content).hexdigest()
    self.vocab_size = self._backend.vocab_size
    self.bos_token, self.bos_id = self._find('bos_token', bos_token, BOS_TOKENS)
    self.eos_token, self.eos_id = self._find('eos_token', eos_token, EOS_TOKENS)

  @classmethod
  def load(
    cls, path: str | os.PathLike, bos_token: str | None = None, eos_token: str | None = None
  ) -> Self:
    """Loads a `tokenizer.json`, a SentencePiece `.model`, or a folder that holds one of them.

    Raises:
      UserError: there is no such file, it cannot be read, or it lacks the begin or end token.
    """
    file = folders.at(path)
    if file.is_dir():
      found = [file / name for name in (HUGGING_FACE_FILE, SENTENCEPIECE_FILE)]
      file = next((candidate for candidate in found if candidate.is_file()), None)
      if file is None:
        raise UserError(
          f'{path} holds no {HUGGING_FACE_FILE} and no {SENTENCEPIECE_FILE}: name the file itself.'
        )
    names = {'.json': HUGGING_FACE_FILE, '.model': SENTENCEPIECE_FILE}
    if file.suffix not in names:
      raise UserError(f'{path} is no tokenizer: give a tokenizer.json or a SentencePiece .model.')
    content = read_file(file)
    try:
      return cls(content, names[file.suffix], bos_token, eos_token)
    except UserError as error:
      raise UserError(f'The tokenizer {file} {error}') from error

  @classmethod
  def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
    """Trains byte-level BPE: lossless on any text, digits apart, `<|bos|>` 0 and `<|eos|>` 1.

    The same texts in the same order give the same tokenizer, byte for byte. Few texts may hold
    fewer than `vocab_size` tokens: `Tokenizer.vocab_size` says how many there are.

    Raises:
      UserError: `vocab_size` has no room for the 256 bytes and the two special tokens, or is past
        LARGEST_VOCAB.
    """
    if vocab_size < SMALLEST_VOCAB:
      raise UserError(
        f'--train_tokenizer={vocab_size} is too small: a byte-level vocabulary needs at least'
        f' {SMALLEST_VOCAB} tokens.'
      )
    if vocab_size > LARGEST_VOCAB:
      raise UserError(
        f'--train_tokenizer={vocab_size} is too large: at most {LARGEST_VOCAB:,} tokens.'
      )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
      [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
      ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
      vocab_size=vocab_size,
      special_tokens=[BOS_TOKENS[0], EOS_TOKENS[0]],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return cls(tokenizer.to_str(pretty=True).encode(), HUGGING_FACE_FILE)

  def encode(self, text: str) -> list[int]:
    """The ids of one text, without begin and end."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """The ids of several texts, without begin and end."""
    return self._backend.encode_batch(texts)

  def decode(self, ids: Iterable[int]) -> str:
    """The text of some ids; special tokens are left out, broken UTF-8 becomes U+FFFD."""
    return self._backend.decode([int(i) for i in ids if i not in (self.bos_id, self.eos_id)])

  def save(self, folder: str | os.PathLike) -> Path:
    """Writes the tokenizer's file, unchanged, into `folder` and returns its path."""
    path = Path(folder) / self.file_name
    path.write_bytes(self._content)
    return path

  def __reduce__(self):
    return Tokenizer, (self._content, self.file_name, self.bos_token, self.eos_token)

  def _find(self, flag: str, token: str | None, known: Sequence[str]) -> tuple[str, int]:
    for name in known if token is None else [token]:
      token_id = self._backend.token_id(name)
      if token_id is not None:
        return name, token_id
    if token is None:
      raise UserError(f'has none of the well-known tokens {", ".join(known)}: name its --{flag}.')
    raise UserError(f'has no token {token!r}: mend --{flag}.')


class _HuggingFace:
  def __init__(self, content: bytes):
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    except BaseException as error:  # the library raises bare Exceptions
      _check_own(error)
      raise UserError(f'is not a tokenizer.json that can be read ({_line(error)}).') from error
    # A tokenizer.json may carry its model's truncation, which would silently cut documents.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._tokenizer.encode_special_tokens = True
    self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1

  def token_id(self, token: str) -> int | None:
    return self._tokenizer.token_to_id(token)

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    ids = []
    for batch in batches(texts):
      try:
        encodings = self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
      except BaseException as error:  # its model may have no token for what it does not know
        _check_own(error)
        raise UserError(f'The tokenizer cannot encode a text ({_line(error)}): mend it.') from error
      ids += [encoding.ids for encoding in encodings]
    return ids

  def decode(self, ids: list[int]) -> str:
    return self._tokenizer.decode(ids, skip_special_tokens=True)


class _SentencePiece:
  def __init__(self, content: bytes):
    try:
      import sentencepiece  # only who brings a .model needs the package
    except ImportError as error:
      raise UserError('needs the package sentencepiece: pip install sentencepiece.') from error
    self._processor = sentencepiece.SentencePieceProcessor()
    try:
      self._processor.LoadFromSerializedProto(content)
    except (RuntimeError, TypeError) as error:
      raise UserError(f'is not a SentencePiece model ({_line(error)}).') from error
    self.vocab_size = self._processor.GetPieceSize()
    if not self.vocab_size:
      raise UserError('is not a SentencePiece model (it holds no pieces).')

  def token_id(self, token: str) -> int | None:
    token_id = self._processor.PieceToId(token)
    return token_id if self._processor.IdToPiece(token_id) == token else None

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [self._processor.EncodeAsIds(text) for text in texts]

  def decode(self, ids: list[int]) -> str:
    return self._processor.DecodeIds([i for i in ids if not self._processor.IsControl(i)])


def batches(texts: Sequence[str], most: int = BATCH_BYTES) -> Iterator[list[str]]:
  """The texts in order, as many at a time as have `most` bytes of UTF-8, or one that has more."""
  batch, total = [], 0
  for text in texts:
    size = len(text.encode(errors='surrogatepass'))
    if batch and total + size > most:
      yield batch
      batch, total = [], 0
    batch.append(text)
    total += size
  if batch:
    yield batch


def _check_own(error: BaseException) -> None:
  """Raises an error again unless it is an Exception, or a panic of Rust, which is none."""
  if not isinstance(error, Exception) and type(error).__name__ != 'PanicException':
    raise error


def _line(error: BaseException) -> str:
  return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
