"""A recipe is read back as it was written; what it may not be is refused in one sentence."""

import copy
import json
import math
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bam_jax import config
from bam_jax.errors import UserError


def put(recipe: dict, **changes) -> dict:
  """Sets keys; `runs__seed__tokens=3` is `recipe['runs']['seed']['tokens'] = 3`."""
  for path, value in changes.items():
    *groups, last = path.split('__')
    group = recipe
    for name in groups:
      group = group.setdefault(name, {})
    group[last] = value
  return recipe


def upcycle(recipe: dict, **changes) -> dict:
  """Changes keys of the mixture `btx`; None deletes one."""
  options = recipe['runs']['btx']['init']['upcycle']
  options |= {('from' if key == 'from_' else key): value for key, value in changes.items()}
  return recipe


def test_round_trip(recipe_dict):
  put(recipe_dict, runs__seed__mesh={'fsdp': 2}, data__prepare={'input': 'x', 'tokenizer': 'y'})
  upcycle(recipe_dict, num_experts=5, top_k=2, capacity_factor=1.5, renormalize=True)
  put(recipe_dict, runs__more={**recipe_dict['runs']['seed'], 'init': {'checkpoint': '/nowhere'}})
  parsed = config.parse(recipe_dict)
  plain = config.to_dict(parsed)
  assert config.parse(plain) == parsed
  assert config.parse(json.loads(json.dumps(plain))) == parsed
  inits = [run.init for run in parsed.runs.values()]
  assert inits[0] == 'scratch'
  assert inits[1] == config.FromRun('seed')
  assert inits[3].upcycle.sources == ('seed', 'code', 'law') and inits[3].upcycle.experts == 5
  assert inits[5] == config.FromCheckpoint('/nowhere')


def test_a_completed_recipe_has_every_key_and_says_the_same(recipe_dict):
  completed = config.complete(recipe_dict)
  assert config.parse(completed.to_dict()) == config.parse(recipe_dict)
  completed.runs.seed.compute.dtype = 'bfloat16'  # as a flag on the command line does
  assert config.parse(completed.to_dict()).runs['seed'].compute.dtype == 'bfloat16'
  assert list(completed.runs) == ['seed', 'code', 'law', 'btx', 'bam']


def test_steps_of_a_run(recipe_dict):
  parsed = config.parse(put(recipe_dict, runs__seed__tokens=6 * 128 + 127))
  assert parsed.step_tokens('seed') == 128
  assert parsed.total_steps('seed') == 6 and parsed.warmup_steps('seed') == 2
  parsed = config.parse(put(recipe_dict, steps=3))
  assert parsed.total_steps('seed') == 3 and parsed.warmup_steps('seed') == 1
  recipe_dict['runs']['seed'] |= dict(tokens=0, schedule=dict(peak_learning_rate=1, warmup_steps=0))
  parsed = config.parse(recipe_dict)
  assert parsed.total_steps('seed') == 0


# A change to a valid recipe, and words of the sentence that it is refused with: the key, the value.
REFUSALS = [
  (dict(modle={}), 'config.modle', "did you mean 'model'?"),
  (dict(runs__more={}), 'config.runs.more.', 'is missing'),
  (dict(model=3), 'config.model', 'group of keys', '3'),
  (dict(model__d_model=1.5), 'config.model.d_model', 'whole number', '1.5'),
  (dict(model__num_layers=True), 'config.model.num_layers', 'whole number', 'True'),
  (dict(name=3), 'config.name', 'string', '3'),
  (dict(model__d_model=10**400), 'config.model.d_model', 'exceeds 64 bits'),
  (dict(runs__seed__data__law=True), 'config.runs.seed.data.law', 'number', 'True'),
  (dict(model__ffn_dim=0), 'config.model', 'ffn_dim=0', 'between 1 and'),
  (dict(seed=2**32), 'config', 'seed=4294967296'),  # JAX keeps 32 bits: it would be 0 again
  (dict(model__num_heads=3), 'config.model', 'num_heads=3', 'multiple', 'num_kv_heads=2'),
  (dict(model__head_dim=7), 'config.model', 'head_dim=7', 'odd'),
  (dict(model__norm_place='post'), 'config.model', "norm_place='post'", "block='sequential'"),
  (dict(model__rotary_dim=3), 'config.model', 'rotary_dim=3', 'odd'),
  (dict(model__layer_types=['sliding']), 'config.model', 'layer_types has 1 entries'),
  (dict(model__window=4), 'config.model', 'window=4', 'layer_types'),
  (dict(model__nope_layers=[9]), 'config.model', 'nope_layers=[9]'),
  (dict(model__rope_scaling={'kind': 'yarn', 'factor': 2}), 'rope_scaling', 'original_length'),
  (dict(model__rope_theta=0), 'config.model', 'rope_theta=0', 'not positive'),
  (dict(model__ffn_experts={'num_experts': 2}), 'config', 'model has experts', 'upcycle'),
  (
    dict(model__ffn_experts={'num_experts': 2, 'capacity_factor': 0.5}),
    'config.model.ffn_experts', 'capacity_factor=0.5', 'dropless',
  ),
  (dict(runs__seed__compute={'dtype': 'float16'}), 'compute.dtype', "'float16'", "'bfloat16'"),
  (dict(runs__seed__schedule__warmup_steps=7), 'runs.seed.schedule.warmup_steps=7', '6 steps'),
  (dict(runs__seed__router_warmup_steps=6), 'runs.seed.router_warmup_steps=6', '6 steps'),
  (dict(runs__seed__optimizer={'b1': 1.0}), 'config.runs.seed.optimizer', 'b1=1.0'),
  (dict(runs__seed__learning_rate_factors={'embed': -1}), "learning_rate_factors['embed']=-1"),
  (dict(runs__seed__mesh={'data': 3}), 'batch_size=8', 'grad_accum_steps=1', '3 parts', 'mesh'),
  (dict(runs__seed__guard={'on_nan': 'ignore'}), 'runs.seed.guard', 'on_nan', 'halt', 'skip'),
  (dict(runs__seed__tokens=127), 'config', 'runs.seed.tokens=127', 'one batch'),
  (dict(runs__seed__data__law=math.nan), 'config.runs.seed', "data['law']=nan"),
  (dict(runs={}), 'config', 'runs', 'names no run'),
  (
    dict(runs__code__init={'runs': 'seed'}),
    'config.runs.code.init', "{'runs': 'seed'}", "'scratch'", 'run', 'checkpoint', 'upcycle',
  ),
  (dict(runs__code__init={'run': 'sead'}), 'config', 'runs.code.init', "'sead'", 'seed'),
  (
    dict(data__prepare={'input': 'x', 'tokenizer': 'y', 'train_tokenizer': 300}),
    'config.data.prepare', 'train_tokenizer', 'one of',
  ),
]  # fmt: skip


@pytest.mark.parametrize('case', REFUSALS, ids=str)
def test_a_refusal_names_the_key(recipe_dict, case):
  changes, *words = case
  check_refused(put(recipe_dict, **changes), words)


UPCYCLE_REFUSALS = [
  (dict(method='bxt'), "'bxt'", "'btx'", "'bam_kv_experts'"),
  (dict(from_=['seed', 'laws']), "'laws'", 'law'),
  (dict(from_='seed'), 'from must be a list', "'seed'"),
  (dict(from_=[]), 'from=[]', "'btx'", 'two sources'),
  (dict(from_=['seed'], method='average'), 'from=', "'average'", 'two'),
  (dict(method='sparse', num_experts=4), 'from=', "'sparse'", 'exactly one source'),
  (dict(method='sparse', from_=['seed']), 'num_experts=0', "'sparse'"),
  (dict(num_experts=2), 'num_experts=2', '3 sources'),
  (dict(attention_top_k=1), 'attention_top_k=1', "'btx'"),
  (dict(router_scale=math.nan), 'router_scale=nan'),
]


@pytest.mark.parametrize('case', UPCYCLE_REFUSALS, ids=str)
def test_a_refused_upcycle_names_the_key(recipe_dict, case):
  changes, *words = case
  check_refused(upcycle(recipe_dict, **changes), ['config', 'runs.btx.init', *words])


@pytest.mark.parametrize('name', ['a/b', '..', 'a b', '', '-', '_', 'report'])
def test_names_of_runs_are_names_of_folders(recipe_dict, name):
  # `report` is where the workdir keeps its tables.
  recipe_dict['runs'][name] = recipe_dict['runs']['seed']
  check_refused(recipe_dict, ['config', repr(name)])


def check_refused(recipe: dict, words: list[str]) -> None:
  with pytest.raises(UserError) as caught:
    config.parse(recipe)
  message = str(caught.value)
  for word in words:
    assert word in message
  assert '\n' not in message and message.endswith(('.', '?')), message


SCALARS = (
  st.none()
  | st.booleans()
  | st.integers(-3, 12)
  | st.sampled_from([10**9, 10**20, -(10**20), 10**400, 2**63])
  | st.floats()
  | st.sampled_from(['', 'seed', 'code', 'btx', 'sparse', 'scratch', 'float32', 'full', 'x/y'])
  | st.text(max_size=3)
  | st.binary(max_size=2)
)
KEYS = st.sampled_from(
  ['run', 'from', 'upcycle', 'checkpoint', 'num_experts', 'top_k', 'zzz', '']
) | st.integers(0, 2)
VALUES = st.recursive(
  SCALARS,
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
  max_leaves=5,
)


def places(group: dict, path: tuple = ()) -> Iterator[tuple]:
  """Paths to every key of nested dicts."""
  for name, value in group.items():
    yield *path, name
    if isinstance(value, dict):
      yield from places(value, (*path, name))


@settings(
  max_examples=200,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_anything_else_is_refused_or_sane(recipe_dict, data):
  recipe = config.to_dict(config.parse(recipe_dict))  # with every key that there is
  for _ in range(data.draw(st.integers(1, 3))):
    *groups, last = data.draw(st.sampled_from(list(places(recipe))))
    group = recipe
    for name in groups:
      group = group[name]
    match data.draw(st.sampled_from(['delete', 'set', 'set', 'set', 'add'])):
      case 'delete':
        del group[last]
      case 'set':
        group[last] = data.draw(VALUES)
      case 'add':
        group[data.draw(KEYS)] = data.draw(VALUES)
  before = copy.deepcopy(recipe)
  try:
    parsed = config.parse(recipe)
  except UserError as error:
    assert str(error).startswith('config')
    return
  assert repr(recipe) == repr(before)
  check_sane(parsed)
  assert config.parse(config.to_dict(parsed)) == parsed


def check_sane(recipe: config.Recipe) -> None:
  """What the rest of the code relies on."""
  model = recipe.model
  assert model.num_heads % model.num_kv_heads == 0 and model.head_dim % 2 == 0
  assert min(model.vocab_size, model.d_model, model.num_layers, model.ffn_dim) >= 1
  assert 0 < model.norm_epsilon < math.inf and 0 < model.rope_theta < math.inf
  assert recipe.runs and recipe.data.sequence_length >= 1
  for name, run in recipe.runs.items():
    assert isinstance(name, str) and '/' not in name
    assert run.batch_size % (run.grad_accum_steps * run.mesh.batch_shards) == 0
    assert all(0 < share < math.inf for share in run.data.values()) and run.data
    assert recipe.total_steps(name) >= (1 if run.tokens else 0)
    assert 0 <= recipe.warmup_steps(name) <= max(recipe.total_steps(name), 1)
    assert all(parent in recipe.runs for parent in config.parents(run))
    if isinstance(run.init, config.FromUpcycle):
      upcycle = run.init.upcycle
      assert upcycle.experts >= len(upcycle.sources) >= 1
      assert math.isfinite(upcycle.router_scale) and math.isfinite(upcycle.capacity_factor)
