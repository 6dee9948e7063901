"""One small interface over Hugging Face `tokenizer.json` and SentencePiece `.model` files."""

import codecs
import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import sentencepiece
import tokenizers
from etils import epath
from sentencepiece import sentencepiece_model_pb2

from bam_jax.config.strict import require
from bam_jax.errors import UserError
from bam_jax.files import folders

HUGGING_FACE_FILE = 'tokenizer.json'
SENTENCEPIECE_FILE = 'tokenizer.model'
CONFIG_FILE, TEMPLATE_FILE = 'tokenizer_config.json', 'chat_template.jinja'  # of transformers

# In order of preference; a token in both lists may be BOS and EOS alike.
BOS_TOKENS = (
  '<|bos|> <BOS_TOKEN> <|begin_of_text|> <s> <bos> [BOS] <|startoftext|> <|endoftext|>'
).split()
EOS_TOKENS = (
  '<|eos|> <|END_OF_TURN_TOKEN|> <EOS_TOKEN> <|end_of_text|> </s> <eos> [EOS] <|endoftext|>'
).split()
FILE_BYTES = 2**28  # of a tokenizer's file, at most
BATCH_BYTES = 2**22  # encoded at a time: each takes some 100 bytes until all are encoded


def read_file(path: Path | epath.Path) -> bytes:
  """A tokenizer's file without a byte-order mark; UserError if unreadable or over FILE_BYTES."""
  try:
    with path.open('rb') as file:
      content = file.read(FILE_BYTES + 1)
  except OSError as error:
    raise UserError(f'The tokenizer {path} cannot be read: {error.strerror or error}.') from error
  wrong = f'{path} is larger than {FILE_BYTES >> 20} MiB: it is not a tokenizer.'
  require(len(content) <= FILE_BYTES, wrong)
  return content.removeprefix(codecs.BOM_UTF8)


class Tokenizer:
  """Text to token ids and back.

  The ids of a text depend on the text alone. What a tokenizer's file says of truncation, padding
  and dropout is switched off, and a special token's name inside a text is spelled out like any
  other characters: it never becomes the special id, so that no document can forge its own end.

  Attributes:
    vocab_size: one more than the largest id.
    bos_token, bos_id: the token that begins every document, and its id.
    eos_token, eos_id: the token that ends every document, and its id.
    hash: SHA-256 of the tokenizer's file, in hex.
    file_name: `tokenizer.json` or `tokenizer.model`, the name under which `save` writes it.
    switched_off: names of what the file asks for and is switched off.
    beside: other files of transformers, by name, which `save` writes too; they change no ids.
  """

  def __init__(
    self,
    content: bytes,
    file_name: str,
    bos_token: str | None = None,
    eos_token: str | None = None,
    beside: Mapping[str, bytes] | None = None,
  ):
    """Reads the bytes of a file of the kind that `file_name` says; UserError when they are not.

    Without `bos_token` and `eos_token` it looks for well-known ones.
    """
    backend = _HuggingFace if file_name == HUGGING_FACE_FILE else _SentencePiece
    self._content, self._backend, self.beside = content, backend(content), dict(beside or {})
    self.file_name, self.hash = file_name, hashlib.sha256(content).hexdigest()
    self.vocab_size = self._backend.vocab_size
    self.switched_off = self._backend.switched_off
    self.bos_token, self.bos_id = self._find('bos_token', bos_token, BOS_TOKENS)
    self.eos_token, self.eos_id = self._find('eos_token', eos_token, EOS_TOKENS)

  @classmethod
  def load(
    cls, path: str | os.PathLike, bos_token: str | None = None, eos_token: str | None = None
  ) -> Self:
    """Loads a `tokenizer.json`, a SentencePiece `.model`, or a folder with one; else UserError."""
    file = folders.at(path)
    names = {'.json': HUGGING_FACE_FILE, '.model': SENTENCEPIECE_FILE}
    if file.is_dir():
      found = [file / name for name in names.values() if (file / name).is_file()]
      wrong = f'{path} holds no {" and no ".join(names.values())}: name the file itself.'
      require(found, wrong)
      file = found[0]
    wrong = f'{path} is not a tokenizer: give a tokenizer.json or a .model.'
    require(file.suffix in names, wrong)
    content, others = read_file(file), (file.parent / name for name in (CONFIG_FILE, TEMPLATE_FILE))
    beside = {other.name: read_file(other) for other in others if other.is_file()}
    try:
      return cls(content, names[file.suffix], bos_token, eos_token, beside)
    except UserError as error:
      raise UserError(f'The tokenizer {file} {error}') from error

  def encode(self, text: str) -> list[int]:
    """The ids of one text, without BOS and EOS."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """The ids of several texts, without BOS and EOS."""
    ids = self._backend.encode_batch(texts)
    for number, of_text in enumerate(ids):
      if self.bos_id in of_text or self.eos_id in of_text:
        ids[number] = self._spell_out(texts[number])
    return ids

  def _spell_out(self, text: str) -> list[int]:
    """The ids of a text in which the names of BOS or EOS occur, cut after their first character."""
    names = re.compile('|'.join(map(re.escape, (self.bos_token, self.eos_token))))
    cuts = [0, *(match.start() + 1 for match in names.finditer(text)), len(text)]
    pieces = [text[start:stop] for start, stop in itertools.pairwise(cuts)]
    ids = itertools.chain.from_iterable(self._backend.encode_batch(pieces))
    return [number for number in ids if number not in (self.bos_id, self.eos_id)]

  def difference(self, other: 'Tokenizer') -> str:
    """What gives a text other ids in `other`, for a person to read; '' if nothing does.

    Compared by meaning: ids of all words, merges, normaliser and so on, whatever the file's bytes.
    Templates, and words that only one of them has beyond the other's last, do not matter.
    """
    for name in ('bos_token', 'eos_token'):
      if getattr(self, name) != getattr(other, name):
        return f'{name} is {getattr(self, name)!r} in one and {getattr(other, name)!r} in the other'
    if self.hash == other.hash:
      return ''
    ours, theirs = self._backend.meaning(), other._backend.meaning()
    for number, (one, two) in enumerate(zip(ours.pop('words'), theirs.pop('words'))):
      if one != two:
        return f'{number} is {one!r} in one and {two!r} in the other'
    return next((f'their {key} differs' for key in ours if ours[key] != theirs.get(key)), '')

  def decode(self, ids: Iterable[int]) -> str:
    """The text of some ids; special tokens are left out, broken UTF-8 becomes U+FFFD."""
    return self._backend.decode([int(i) for i in ids if i not in (self.bos_id, self.eos_id)])

  def save(self, folder: str | os.PathLike) -> Path:
    """Writes the tokenizer's files, unchanged, into `folder`; returns the path of its own."""
    path = folders.at(folder) / self.file_name
    for name, content in (*self.beside.items(), (self.file_name, self._content)):
      folders.write_file(path.parent / name, content)
    return path

  def _find(self, flag: str, token: str | None, known: Sequence[str]) -> tuple[str, int]:
    for name in known if token is None else [token]:
      if (token_id := self._backend.token_id(name)) is not None:
        return name, token_id
    if token is None:
      raise UserError(f'has none of the well-known tokens {", ".join(known)}: set --{flag}.')
    raise UserError(f'has no token {token!r}: correct --{flag}.')


class _HuggingFace:
  def __init__(self, content: bytes):
    with _explained('is not a tokenizer.json'):
      made = tokenizers.Tokenizer.from_str(content.decode())
    dropout = getattr(made.model, 'dropout', None)  # of BPE
    asked = {'truncation': made.truncation, 'padding': made.padding, 'dropout': dropout}
    self.switched_off = tuple(name for name, value in asked.items() if value)
    made.no_truncation()
    made.no_padding()
    if dropout:
      made.model.dropout = None
    made.encode_special_tokens = True
    self.vocab_size = max(made.get_vocab().values(), default=-1) + 1
    self._tokenizer = made

  def token_id(self, token: str) -> int | None:
    return self._tokenizer.token_to_id(token)

  def meaning(self) -> dict[str, Any]:
    facts = json.loads(self._tokenizer.to_str())
    model = {key: value for key, value in facts['model'].items() if key not in ('vocab', 'dropout')}
    by_id = {number: word for word, number in self._tokenizer.get_vocab().items()}
    words = [by_id.get(number) for number in range(self.vocab_size)]
    if isinstance(facts['model']['vocab'], list):  # Unigram's has scores
      model['scores'] = facts['model']['vocab']
    parts = ('normalizer', 'pre_tokenizer', 'decoder')
    return {'words': words, 'model': model, **{name: facts[name] for name in parts}}

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    ids = []
    for batch in batches(texts):
      with _explained('The tokenizer cannot encode a text'):  # some models have no unknown token
        encodings = self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
      ids += [encoding.ids for encoding in encodings]
    return ids

  def decode(self, ids: list[int]) -> str:
    return self._tokenizer.decode(ids, skip_special_tokens=True)


class _SentencePiece:
  switched_off = ()

  def __init__(self, content: bytes):
    self._processor = sentencepiece.SentencePieceProcessor()
    with _explained('is not a SentencePiece model'):
      self._processor.LoadFromSerializedProto(content)
    self.vocab_size = self._processor.GetPieceSize()
    require(self.vocab_size, 'is not a SentencePiece model (it holds no pieces).')

  def meaning(self) -> dict[str, Any]:
    proto = sentencepiece_model_pb2.ModelProto.FromString(self._processor.serialized_model_proto())
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    trained = proto.trainer_spec
    how = trained.model_type, trained.byte_fallback, trained.treat_whitespace_as_suffix
    normalizer = proto.normalizer_spec.SerializeToString()
    return {'words': pieces, 'model': how, 'normalizer': normalizer}

  def token_id(self, token: str) -> int | None:
    token_id = self._processor.PieceToId(token)
    return token_id if self._processor.IdToPiece(token_id) == token else None

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return self._processor.EncodeAsIds(list(texts))  # in several threads

  def decode(self, ids: list[int]) -> str:
    return self._processor.DecodeIds([i for i in ids if not self._processor.IsControl(i)])


def batches(texts: Iterable[str], max_bytes: int = BATCH_BYTES) -> Iterator[list[str]]:
  """The texts in order, as many at a time as have `max_bytes` of UTF-8, or one that has more."""
  batch, total = [], 0
  for text in texts:
    size = len(text.encode(errors='surrogatepass'))
    if batch and total + size > max_bytes:
      yield batch
      batch, total = [], 0
    batch.append(text)
    total += size
  if batch:
    yield batch


@contextlib.contextmanager
def _explained(problem: str) -> Iterator[None]:
  """Turns what a library raises, bare Exceptions and panics of Rust, into a UserError."""
  try:
    yield
  except BaseException as error:
    if not isinstance(error, Exception) and type(error).__name__ != 'PanicException':
      raise
    raise UserError(f'{problem} ({folders.first_line(error)}).') from error
