"""Values that nobody should give, and some that one may."""

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# Deterministic, so that a change cannot pass or fail by chance.
CALM = dict(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
BRIEF = settings(max_examples=3, **CALM)

NUMBERS = [
  '', 'x', '-1', '0', '1', '-0.5', '1e30', 'nan', '-inf', str(2**31), str(2**63 - 1), str(2**63),
  '1' * 5000, '0x10', 'None', '[1]',
]  # fmt: skip
# No path here leads to a file that exists: some flags name what is to be written.
WORDS = [
  '', ' ', 'x', '-1', 'a\nb', '\x1b[31mred', '\udcff', 'é\u202e', 'x' * 5000, '.', '..',
  '../../etc/passwd', '/dev/null/x', '/dev/full', '~', '%s{0}', 'a=b', ',', 'x=-1', 'a:b',
]  # fmt: skip
CHOICES = ['', 'x', '1', 'true', 'None', 'a\nb', '\x7f', 'x' * 5000]


def of_flag(flag: dict) -> list[str]:
  """Values for a flag, of its type or not."""
  if flag['type'] in ('int', 'float'):
    return NUMBERS
  return CHOICES if flag['type'] in ('bool', 'string enum') else WORDS


def text() -> st.SearchStrategy[str]:
  """What a shell may hand on, without '/': see WORDS."""
  of_bytes = st.binary(max_size=8).map(
    lambda b: os.fsdecode(b.replace(b'\0', b'').replace(b'/', b''))
  )
  letters = st.characters(exclude_characters='/\0', codec='utf-8')
  return st.text(letters, max_size=20) | of_bytes
