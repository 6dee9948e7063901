"""A new tokenizer from text."""

import threading
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from bam_jax.config.strict import require
from bam_jax.data.tokenizer import BOS_TOKENS, EOS_TOKENS, HUGGING_FACE_FILE, Tokenizer

MIN_VOCAB = 258  # 256 bytes, BOS and EOS
MAX_VOCAB = 2**20  # the trainer allocates room for all of it
MAX_PRE_TOKEN = 1024  # bytes: training's time grows with the square of the longest


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """Trains byte-level BPE: lossless on any text, digits apart, `<|bos|>` 0 and `<|eos|>` 1.

  The same texts in the same order give the same tokenizer, byte for byte. Few texts may hold
  fewer than `vocab_size` tokens: `Tokenizer.vocab_size` says how many there are. Runs without
  spaces are cut every MAX_PRE_TOKEN bytes, in training alone.
  """
  wrong = f'--train_tokenizer={vocab_size} is not from {MIN_VOCAB} to {MAX_VOCAB:,}.'
  require(MIN_VOCAB <= vocab_size <= MAX_VOCAB, wrong)
  digits = pre_tokenizers.Digits(individual_digits=True)
  words = [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
  cut = pre_tokenizers.Split(tokenizers.Regex(f'.{{{MAX_PRE_TOKEN}}}'), 'isolated')
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*words, cut])
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[BOS_TOKENS[0], EOS_TOKENS[0]],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  texts = list(texts)  # here: the library's thread must not run our code while Python exits
  # In a thread, for the library does not notice Ctrl-C; Python's exit does not wait for it.
  arguments, work = (texts, trainer), tokenizer.train_from_iterator
  thread = threading.Thread(target=work, args=arguments, daemon=True)
  thread.start()
  thread.join()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
  return Tokenizer(tokenizer.to_str(pretty=True).encode(), HUGGING_FACE_FILE)
