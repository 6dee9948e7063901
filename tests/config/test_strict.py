"""Dictionaries to dataclasses: what fits comes back unchanged, what does not is named."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pytest

from bam_jax.config import strict
from bam_jax.errors import UserError


@dataclass(frozen=True)
class Inner:
  size: int
  share: float = 0.5

  def __post_init__(self):
    if self.size < 1:
      raise UserError(f'size={self.size} is below 1.')


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
  count=3,
  flag=True,
  label='x',
  kind='b',
  names=('p', 'q'),
  shares={'p': 0.25, 'q': 1.0},
  inner=Inner(2),
  inners={'one': Inner(1, 0.1)},
  start=ByPath('/tmp'),
  note='a word',
)


def test_every_kind_of_field_comes_back():
  plain = strict.to_dict(FULL)
  assert plain['from'] == ['p', 'q'] and 'names' not in plain
  assert strict.from_dict(Outer, plain, 'it') == FULL
  assert strict.from_dict(Outer, json.loads(json.dumps(plain)), 'it') == FULL


def test_defaults_fill_what_is_not_there():
  assert strict.from_dict(Outer, {'count': 1}, 'it') == Outer(1)


@pytest.mark.parametrize('note', [None, 'btx'])
def test_a_string_that_may_be_missing(note):
  assert strict.from_dict(Outer, {'count': 1, 'note': note}, 'it').note == note


@pytest.mark.parametrize(
  'start, parsed',
  [
    ('scratch', 'scratch'),
    ({'name': 'n'}, ByName('n')),
    ({'path': 'p'}, ByPath('p')),
  ],
  ids=str,
)
def test_one_of_several_groups(start, parsed):
  assert strict.from_dict(Outer, {'count': 1, 'start': start}, 'it').start == parsed


def test_numbers_become_the_type_that_is_asked_for():
  parsed = strict.from_dict(Outer, {'count': 2.0, 'shares': {'p': 1}}, 'it')
  assert type(parsed.count) is int and type(parsed.shares['p']) is float


REFUSALS = {
  'not a group': (3, 'it must be a group of keys, not 3.'),
  'typing error': ({'cuont': 1}, "it.cuont does not exist; did you mean 'count'?"),
  'the key and not the attribute': ({'count': 1, 'names': []}, 'it.names does not exist'),
  'nothing like it': ({'zzz': 1}, 'it.zzz does not exist; it has count, flag, label'),
  'a key that is no string': ({'count': 1, 7: 1}, 'it.7 does not exist'),
  'missing': ({}, 'it.count is missing.'),
  'missing deeper': ({'count': 1, 'inner': {}}, 'it.inner.size is missing.'),
  'a string for a whole number': ({'count': '1'}, "it.count must be a whole number, not '1'."),
  'a fraction for a whole number': ({'count': 1.5}, 'it.count must be a whole number, not 1.5.'),
  'nan for a whole number': ({'count': float('nan')}, 'it.count must be a whole number, not nan.'),
  'infinity for a whole number': (
    {'count': float('inf')},
    'it.count must be a whole number, not inf.',
  ),
  'True for a whole number': ({'count': True}, 'it.count must be a whole number, not True.'),
  'None for a whole number': ({'count': None}, 'it.count must be a whole number, not None.'),
  'True for a number': (
    {'count': 1, 'shares': {'p': True}},
    'it.shares.p must be a number, not True.',
  ),
  'a number for True or False': ({'count': 1, 'flag': 1}, 'it.flag must be True or False, not 1.'),
  'a number for a string': ({'count': 1, 'label': 1}, 'it.label must be a string, not 1.'),
  'not a choice': ({'count': 1, 'kind': 'c'}, "it.kind='c' is not one of 'a', 'b'."),
  'an unhashable choice': ({'count': 1, 'kind': []}, "it.kind=[] is not one of 'a', 'b'."),
  'a string for a list': ({'count': 1, 'from': 'pq'}, "it.from must be a list, not 'pq'."),
  'in a list': ({'count': 1, 'from': ['p', 2]}, 'it.from[1] must be a string, not 2.'),
  'a list for a group': ({'count': 1, 'shares': []}, 'it.shares must be a group of keys, not [].'),
  'a number for a group': ({'count': 1, 'inner': 3}, 'it.inner must be a group of keys, not 3.'),
  'in a group of groups': (
    {'count': 1, 'inners': {'one': {'size': 'x'}}},
    "it.inners.one.size must be a whole number, not 'x'.",
  ),
  "the dataclass's own check": ({'count': 1, 'inner': {'size': 0}}, 'it.inner: size=0 is below 1.'),
  'none of the groups': ({'count': 1, 'start': {'zzz': 1}}, "it.start={'zzz': 1} is none of"),
  'a group by its class': (
    {'count': 1, 'start': {'bypath': {'path': 'p'}}},
    "it.start={'bypath': {'path': 'p'}} is none of",
  ),
  'another word': ({'count': 1, 'start': 'scratchy'}, "it.start='scratchy' is none of"),
  'past every machine': ({'count': 10**400}, 'it.count'),
  'past every machine, as a float': ({'count': 1e300}, 'it.count is past 64 bits'),
  'past every float': ({'count': 1, 'shares': {'p': 10**400}}, 'it.shares.p'),
  'two groups at once': (
    {'count': 1, 'start': {'name': 'n', 'path': 'p'}},
    'it.start.path does not exist',
  ),
}


@pytest.mark.parametrize('value, sentence', REFUSALS.values(), ids=REFUSALS)
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
