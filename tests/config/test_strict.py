"""Dictionaries to dataclasses: what fits comes back unchanged, what does not is named."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pytest

from bam_jax.config import strict
from bam_jax.errors import UserError


@dataclass(frozen=True)
class Inner(strict.Section):
  size: strict.PositiveInt
  share: strict.Fraction = 0.5

  def check(self):
    self.require(self.size != 7, f'size={self.size} is unlucky.')


@dataclass(frozen=True)
class ByName:
  name: str


@dataclass(frozen=True)
class ByPath:
  path: str


@dataclass(frozen=True)
class Outer:
  count: int
  flag: bool = False
  label: str = ''
  kind: Literal['a', 'b'] = 'a'
  names: tuple[str, ...] = field(default=(), metadata={'key': 'from'})
  shares: Mapping[str, float] = field(default_factory=dict)
  inner: Inner | None = None
  inners: Mapping[str, Inner] = field(default_factory=dict)
  start: Literal['scratch'] | ByName | ByPath = 'scratch'
  note: str | None = None


FULL = Outer(
  count=3, flag=True, label='x', kind='b', names=('p', 'q'), shares={'p': 0.25, 'q': 1.0},
  inner=Inner(2), inners={'one': Inner(1, 0.1)}, start=ByPath('/tmp'), note='a word',
)  # fmt: skip


def test_every_kind_of_field_comes_back():
  plain = strict.to_dict(FULL)
  assert plain['from'] == ['p', 'q'] and 'names' not in plain
  assert strict.from_dict(Outer, plain, 'it') == FULL
  assert strict.from_dict(Outer, json.loads(json.dumps(plain)), 'it') == FULL


def test_defaults_fill_what_is_not_there():
  assert strict.from_dict(Outer, {'count': 1}, 'it') == Outer(1)
  assert strict.from_dict(Outer, {'count': 1, 'note': None}, 'it') == Outer(1)


@pytest.mark.parametrize(
  'start, parsed',
  [('scratch', 'scratch'), ({'name': 'n'}, ByName('n')), ({'path': 'p'}, ByPath('p'))],
  ids=str,
)
def test_one_of_several_groups(start, parsed):
  assert strict.from_dict(Outer, {'count': 1, 'start': start}, 'it').start == parsed


def test_numbers_become_the_type_that_is_asked_for():
  parsed = strict.from_dict(Outer, {'count': 2.0, 'shares': {'p': 1}}, 'it')
  assert type(parsed.count) is int and type(parsed.shares['p']) is float


REFUSALS = [
  (3, 'it must be a group of keys, not 3.'),
  ({'cuont': 1}, "it.cuont does not exist; did you mean 'count'?"),
  ({'count': 1, 'names': []}, 'it.names does not exist'),  # the attribute, and not the key
  ({'zzz': 1}, 'it.zzz does not exist; it has count, flag, label'),
  ({'count': 1, 7: 1}, 'it.7 does not exist'),
  ({}, 'it.count is missing.'),
  ({'count': 1, 'inner': {}}, 'it.inner.size is missing.'),
  ({'count': '1'}, "it.count must be a whole number, not '1'."),
  ({'count': 1.5}, 'it.count must be a whole number, not 1.5.'),
  ({'count': math.inf}, 'it.count must be a whole number, not inf.'),
  ({'count': True}, 'it.count must be a whole number, not True.'),
  ({'count': None}, 'it.count must be a whole number, not None.'),
  ({'count': 10**400}, 'it.count exceeds 64 bits'),
  ({'count': 1e300}, 'it.count exceeds 64 bits'),
  ({'count': 1, 'shares': {'p': 10**400}}, 'it.shares.p exceeds 64 bits'),
  ({'count': 1, 'shares': {'p': True}}, 'it.shares.p must be a number, not True.'),
  ({'count': 1, 'flag': 1}, 'it.flag must be True or False, not 1.'),
  ({'count': 1, 'label': 1}, 'it.label must be a string, not 1.'),
  ({'count': 1, 'kind': 'c'}, "it.kind='c' is not one of 'a', 'b'."),
  ({'count': 1, 'kind': []}, "it.kind=[] is not one of 'a', 'b'."),
  ({'count': 1, 'from': 'pq'}, "it.from must be a list, not 'pq'."),
  ({'count': 1, 'from': ['p', 2]}, 'it.from[1] must be a string, not 2.'),
  ({'count': 1, 'shares': []}, 'it.shares must be a group of keys, not [].'),
  ({'count': 1, 'inner': 3}, 'it.inner must be a group of keys, not 3.'),
  ({'count': 1, 'inners': {'one': {'size': 'x'}}}, 'it.inners.one.size must be a whole number'),
  ({'count': 1, 'inner': {'size': 0}}, 'it.inner: size=0 is below 1.'),
  ({'count': 1, 'inner': {'size': 7}}, 'it.inner: size=7 is unlucky.'),
  ({'count': 1, 'inner': {'size': 1, 'share': 2}}, 'it.inner: share=2.0 is not between 0 and 1.'),
  ({'count': 1, 'inner': {'size': 1, 'share': math.nan}}, 'share=nan is not a finite number.'),
  ({'count': 1, 'start': {'zzz': 1}}, "it.start={'zzz': 1} is none of"),
  ({'count': 1, 'start': {'bypath': {}}}, "it.start={'bypath': {}} is none of"),
  (
    {'count': 1, 'start': 'scratchy'},
    "it.start='scratchy' is none of these: 'scratch'; a group of",
  ),
  ({'count': 1, 'start': {'name': 'n', 'path': 'p'}}, 'it.start.path does not exist'),
]


@pytest.mark.parametrize('value, sentence', REFUSALS, ids=str)
def test_a_refusal_names_the_key(value, sentence):
  with pytest.raises(UserError) as caught:
    strict.from_dict(Outer, value, 'it')
  assert sentence in str(caught.value)


def test_differences_name_what_changed():
  old = strict.to_dict(FULL)
  new = strict.to_dict(dataclasses.replace(FULL, inner=Inner(3), note=None))
  assert strict.differences(old, new) == ['inner.size: 2 -> 3', "note: 'a word' -> None"]
  assert strict.differences(old, old) == []
  assert strict.differences({'a': 1}, {'b': {'c': 2}}) == ['a: 1 -> None', "b: None -> {'c': 2}"]
