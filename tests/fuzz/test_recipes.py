"""Files that are not recipes, and every key of a recipe with values of all kinds."""

import dataclasses
import typing
from collections.abc import Iterator, Mapping

import pytest

from bam_jax import config

FILES = {
  'empty': b'',
  'no_python': b'def get_config(:\n',
  'binary': bytes(range(256)),
  'raises': b'def get_config():\n  return 1 / 0\n',
  'raises_at_once': b'raise ValueError("two\\nlines")\n',
  'returns_a_dict': b'def get_config():\n  return {"name": "x"}\n',
  'is_no_function': b'get_config = 3\n',
}
LITERALS = ['', 'x', '-1', '1', '0.5', 'nan', str(2**63), 'True', 'None', '[]', '{"x": 1}', '\x1b']


@pytest.mark.parametrize('name', FILES)
def test_a_recipe_that_is_none(server, tmp_path, name):
  path = tmp_path / f'{name}.py'
  path.write_bytes(FILES[name])
  for more in ([], ['--config.seed=1']):
    outcome = server.run('account', f'--config={path}', *more)
    assert outcome.check(*([] if more else [str(path)])).status == 2
  if name.startswith('raises'):
    assert f'{path}, line ' in outcome.sentence, outcome.sentence


def test_a_recipe_that_is_not_there(server, tmp_path):
  (tmp_path / 'loop.py').symlink_to('loop.py')
  paths = [tmp_path, tmp_path / 'nowhere.py', tmp_path / 'loop.py', '/dev/zero', '', 'x' * 5000]
  for path in paths:
    for more in ([], ['--config.seed=1']):
      outcome = server.run('account', f'--config={path}', *more)
      assert outcome.check('--config=', str(path)[:100]).status == 2


class Key(typing.NamedTuple):
  """One key of a recipe, or a group of them."""

  path: tuple[str, ...]
  hint: typing.Any


def keys(cls: type = config.Recipe, above: tuple[str, ...] = ()) -> Iterator[Key]:
  """All keys that there are, by the dataclasses that say so; of each kind of run one."""
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    path = (*above, field.metadata.get('key', field.name))
    yield Key(path, hints[field.name])
    if typing.get_origin(hints[field.name]) is Mapping:
      _, hint = typing.get_args(hints[field.name])
      path = (*path, 'seed' if hint is config.Run else 'general')
      yield Key(path, hint)
    else:
      hint = hints[field.name]
    for section in filter(dataclasses.is_dataclass, [hint, *typing.get_args(hint)]):
      yield from keys(section, path)


def of_kind(path: tuple[str, ...]) -> tuple[str, ...]:
  """The same key of a run that has it."""
  kind = {'upcycle': 'btx', 'run': 'code'}.get(
    path[3] if path[2:3] == ('init',) and len(path) > 3 else ''
  )
  return (path[0], kind, *path[2:]) if kind else path


@pytest.mark.parametrize(
  'section', [*(pytest.param(s, marks=pytest.mark.slow) for s in ('model', 'runs')), 'data', 'seed']
)
def test_any_value_of_any_key_on_the_command_line(server, world, section):
  for key in (key for key in keys() if key.path[0] == section):
    path = '.'.join(of_kind(key.path))
    for value in LITERALS:
      line = f'--config={world.recipe}', f'--config.{path}={value}', '--run=nowhere'
      server.run('account', *line).check('config', key.path[-1], '--run')


REFUSED = {  # past what any machine holds
  'data.sequence_length', 'runs.seed.batch_size', 'runs.seed.mesh.data', 'runs.seed.mesh.fsdp',
  'runs.seed.mesh.expert', 'runs.seed.mesh.tensor', 'runs.seed.grad_accum_steps',
  'evaluation.batch_size',
}  # fmt: skip
FRACTIONS = {
  f'runs.seed.{key}' for key in ('schedule.min_lr_ratio', 'optimizer.b1', 'optimizer.b2')
}
REFUSED_LATE = sorted(REFUSED - {'runs.seed.batch_size'})
SIZES = REFUSED | {'seed', 'runs.seed.compute.unroll'}  # of 32 bits


def numbers() -> Iterator[tuple[str, bool]]:
  """Keys of a run that starts from nothing, and whether they are whole numbers."""
  for key in keys():
    kinds = {int, float} & {key.hint, *typing.get_args(key.hint)}
    others = {'model', 'steps', 'upcycle', 'prepare', 'general', 'router_warmup_steps'} & {
      *key.path
    }
    if kinds and not others and typing.get_origin(key.hint) is not Mapping:
      yield '.'.join(key.path), int in kinds


@pytest.mark.slow
@pytest.mark.parametrize('high', [False, True])
def test_numbers_at_their_limits_train(server, world, tmp_path, high):
  """All at once: what a bound lets through is used by something."""
  line = world.line('main', tmp_path / 'w')
  for key, whole in numbers():
    if not whole:
      line.append(f'--config.{key}={1e30 if high and key not in FRACTIONS else 1e-30}')
    elif high and key not in REFUSED:
      line.append(f'--config.{key}={2**31 - 1 if key in SIZES else 2**62}')
  assert server.run('main', *line, seconds=120).check().status == 0


@pytest.mark.parametrize(
  'key', ['runs.seed.batch_size', *(pytest.param(k, marks=pytest.mark.slow) for k in REFUSED_LATE)]
)
def test_sizes_past_any_machine_are_refused(server, world, tmp_path, key):
  line = world.line('main', tmp_path / 'w')
  line += [f'--config.{key}={2**31 - 1}', f'--config.runs.seed.tokens={2**62}']
  outcome = server.run('main', *line).check(key.rpartition('.')[2], 'mesh', 'batch')
  assert outcome.status == 2 and not (tmp_path / 'w' / 'seed').exists()


@pytest.mark.parametrize('flag', [
  '--config.', '--config.=1', '--config.x=1', '--config.runs=1', '--config.runs.seed=1',
  '--config.runs.seed.tokens.x=1', '--config.runs[0]=1', '--config.seed',
  '--config.runs.seed.data={"x": -1}', '--config.model.__class__=1', '--config.\x1b=1',
  '--config.' + 'x' * 5000, '--config.evaluation.domains=(1,(2,', '--noconfig.seed',
])  # fmt: skip
def test_a_flag_that_names_no_key(server, world, flag):
  server.run('account', f'--config={world.recipe}', flag, '--run=nowhere').check()
