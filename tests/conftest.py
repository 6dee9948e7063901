"""Eight fake CPU devices for every test; the tiny models, recipe and dataset that tests share."""

import ast
import copy
import json
import logging
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest
from etils import epath

import bam_jax
from bam_jax import config
from bam_jax.data import store
from bam_jax.files import folders
from bam_jax.prepare import dataset as prepare_lib
from tests.commands import Server
from tests.gcs.service import serve

# A shell that runs the tests in the background lets them ignore Ctrl-C, and what they start too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests that compare layouts must not meet a real accelerator. Nothing imported so far has asked JAX
# for its devices. Commands that a test starts get the CPU too, but one device, as users' do.
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
# Most programs here run once. Smoke runs of recipes are compiled as for their users.
jax.config.update('jax_disable_most_optimizations', True)
os.environ['JAX_PLATFORMS'] = 'cpu'
# What tests compile is kept for the next run, apart from the user's own cache: this process'
# programs here, those of commands that tests start (compiled as for users) in a folder beside.
CACHE = pathlib.Path(__file__).parents[1] / '.cache' / 'tests'
os.environ['XDG_CACHE_HOME'] = str(CACHE / 'commands')
jax.config.update('jax_compilation_cache_dir', str(CACHE / 'tests'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)

for noisy in ('absl', 'jax', 'orbax'):
  logging.getLogger(noisy).setLevel(logging.ERROR)

# Every dimension that a mesh may cut divides by eight, and no two that matter are equal.
SIZES = dict(
  vocab_size=320, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48
)
FFN = config.FFNExperts(num_experts=4)
VARIANTS = {
  'dense': {},
  'untied': {'tied_embeddings': False},
  'btx': {'ffn_experts': FFN},
  'bam_kv_experts': {'attention_experts': config.AttentionExperts(4), 'ffn_experts': FFN},
  'bam_shared_kv': {
    'attention_experts': config.AttentionExperts(4, shared_kv=True),
    'ffn_experts': FFN,
  },
  'routed_attention': {
    'attention_experts': config.AttentionExperts(4, top_k=2),
    'ffn_experts': config.FFNExperts(num_experts=4, top_k=2),
  },
}
WORDS = {
  'code': 'def return for in range if else print x y i == + ( ) : len list None',
  'general': 'the a of and to in is it that was he for on as with his they at be',
  'law': 'court shall plaintiff section act appeal herein party statute order judge',
  'math': 'let x be an integer such that prime sum equals proof theorem lemma n + 1',
}

NONSENSE = {
  'general': 'the whale and the captain went down to the grey sea and sang of home'.split(),
  'code': 'def return self for in range ( x ) : + = print [ i ] import None'.split(),
}


@pytest.fixture(scope='session')
def command_doc():
  """From a command's name to its docstring; two commands cannot be imported together."""
  root = pathlib.Path(bam_jax.__file__).parent
  files = {path.parent.name: path for path in root.glob('*/__main__.py')}
  return lambda name: ast.get_docstring(ast.parse(files.get(name, root / f'{name}.py').read_text()))


@pytest.fixture
def hold() -> Iterator[Callable[..., subprocess.Popen]]:
  """Starts programs that print "taken", and hold what they took until they end or are killed."""
  started = []

  def start(program: str, *arguments) -> subprocess.Popen:
    process = subprocess.Popen(
      [sys.executable, '-c', program, *map(str, arguments)],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    started.append(process)
    assert process.stdout.readline() == 'taken\n'
    return process

  yield start
  for process in started:
    process.kill()
    process.communicate()


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[..., pathlib.Path]]:
  """The function that makes a real file system of so many KB, and gives its folder."""
  folder = tmp_path / 'disk'

  def mount(kilobytes: int, *options: str) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    option = ','.join([f'size={kilobytes}k', *options])
    line = ['mount', '-t', 'tmpfs', '-o', option, 'tmpfs', str(folder)]
    # Only root may mount, and some containers' root may not. `convert/test_upcycle.py` fills a disk
    # by prlimit, which every user may.
    if shutil.which('mount') is None or subprocess.run(line, capture_output=True).returncode:
      pytest.skip('this user may not mount a file system')
    return folder

  yield mount
  if folder.exists():
    subprocess.run(['umount', '-l', str(folder)], capture_output=True)


@pytest.fixture(scope='session')
def server(tmp_path_factory) -> Iterator[Server]:
  """Runs commands in milliseconds each; tests/commands.py says how."""
  with Server(tmp_path_factory.mktemp('cwd')) as server:
    yield server


@pytest.fixture(scope='session')
def buckets() -> Iterator[dict[str, str]]:
  """A server of buckets: clients in this process remember it, so there is one; its variables."""
  server, environment = serve('bucket')
  yield environment
  server.kill()
  server.communicate()


@pytest.fixture
def service(buckets) -> Iterator[None]:
  """The time in which `gs://bucket` is there, for this process and its children."""
  with pytest.MonkeyPatch.context() as patch:  # its own: a test may undo what it changed itself
    for name, value in buckets.items():
      patch.setenv(name, value)
    yield


@pytest.fixture
def folder(service) -> epath.Path:
  """A folder of the bucket that nobody else writes to."""
  return folders.reach(f'gs://bucket/{uuid.uuid4().hex[:8]}')


@pytest.fixture(scope='session')
def models() -> dict[str, config.Model]:
  """A tiny model of every variant; all have the same sizes, and 4 experts if any."""
  return {name: config.Model(**SIZES, **changes) for name, changes in VARIANTS.items()}


@pytest.fixture(params=VARIANTS)
def model(request, models) -> config.Model:
  """Each variant in turn."""
  return models[request.param]


@pytest.fixture(scope='session')
def make_batch():
  """The function `(batch_size, length, seed=0) -> batch` with documents, padding, odd weights."""

  def make(batch_size: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = batch_size, length
    segments, positions = np.zeros((2, *shape), np.int32)
    for row in range(batch_size):
      cut, end = sorted(rng.integers(1, length + 1, 2))
      segments[row, :end] = 1 + (np.arange(end) >= cut)
      positions[row, :end] = np.arange(end) - np.where(np.arange(end) >= cut, cut, 0)
    return {
      'tokens': rng.integers(0, SIZES['vocab_size'], shape).astype(np.int32),
      'targets': rng.integers(0, SIZES['vocab_size'], shape).astype(np.int32),
      'segments': segments,
      'positions': positions,
      'weights': ((rng.random(shape) < 0.8) & (segments > 0)).astype(np.float32),
    }

  return make


@pytest.fixture(scope='session')
def dataset(tmp_path_factory) -> store.Dataset:
  """Four prepared domains, each with words of its own, and a tokenizer of 320 tokens."""
  folder = tmp_path_factory.mktemp('dataset')
  rng = np.random.default_rng(0)
  for domain, words in WORDS.items():
    (folder / 'text' / domain).mkdir(parents=True)
    for split, documents in (('train', 60), ('valid', 6)):
      lines = [
        json.dumps({'text': ' '.join(rng.choice(words.split(), rng.integers(10, 60)))})
        for _ in range(documents)
      ]
      path = folder / 'text' / domain / f'{split}.jsonl'
      path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
  inputs = {domain: folder / 'text' / domain for domain in WORDS}
  prepare_lib.prepare(inputs, folder / 'tokens', train_tokenizer=SIZES['vocab_size'])
  return store.open_dataset(folder / 'tokens')


@pytest.fixture(scope='session')
def text(tmp_path_factory) -> pathlib.Path:
  """Two domains of nonsense, for jobs that prepare their own data."""
  folder = tmp_path_factory.mktemp('text')
  chance = random.Random(0)
  for domain, words in NONSENSE.items():
    for split, count in (('train', 60), ('valid', 8)):
      path = folder / domain / f'{split}.jsonl'
      path.parent.mkdir(exist_ok=True)
      lines = [' '.join(chance.choices(words, k=chance.randint(5, 60))) for _ in range(count)]
      path.write_text(''.join(json.dumps({'text': line}) + '\n' for line in lines))
  return folder


def _run(label: str, init, data: dict[str, float], **changes) -> dict:
  return {
    'label': label,
    'init': init,
    'data': data,
    'tokens': 6 * 8 * 16,
    'batch_size': 8,
    'schedule': {'peak_learning_rate': 1e-2, 'warmup_steps': 2},
    **changes,
  }


_EVEN = {domain: 0.25 for domain in WORDS}
_UPCYCLE = {'from': ['seed', 'code', 'law']}
_RECIPE = {
  'name': 'tiny',
  'model': {**SIZES, 'tied_embeddings': True},
  'data': {'path': '{workdir}/data', 'sequence_length': 16},
  'evaluation': {'batch_size': 8, 'tokens': 128},
  'runs': {
    'seed': _run('the seed', 'scratch', _EVEN),
    'code': _run('coder', {'run': 'seed'}, {'code': 0.9, 'general': 0.1}),
    'law': _run('lawyer', {'run': 'seed'}, {'law': 0.9, 'general': 0.1}),
    'btx': _run('BTX', {'upcycle': {**_UPCYCLE, 'method': 'btx'}}, _EVEN),
    'bam': _run('BAM', {'upcycle': {**_UPCYCLE, 'method': 'bam_kv_experts'}}, _EVEN),
  },
}


@pytest.fixture
def recipe_dict() -> dict:
  """A valid recipe over `dataset`, plain dicts that the test may change; 6 steps a run."""
  return copy.deepcopy(_RECIPE)
