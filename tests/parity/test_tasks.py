"""lm-eval's requests answered as its own model of transformers answers them, on one checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.evaluate import comparison
from tests.hf import folders

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytest.importorskip('lm_eval', reason='lm-eval is an extra: make test-parity installs it')

import lm_eval  # noqa: E402
import tokenizers  # noqa: E402
import yaml  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from bam_jax.tasks import adapter, session  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
LENGTH = 64
SIZES = dict(
  vocab_size=270, hidden_size=24, intermediate_size=20, num_hidden_layers=3, num_attention_heads=6,
  num_key_value_heads=2, max_position_embeddings=LENGTH, pad_token_id=None, bos_token_id=0,
  eos_token_id=1, logit_scale=0.4, use_qk_norm=True,
)  # fmt: skip
PAIRS = [
  ('the cat', ' sat on the mat'),
  ('the cat ', 'sat'),  # a space that moves
  ('', 'def f(x)'),  # nothing to condition on
  ('é', '🙂'),
  ('the cat sat on the mat. ' * 20, ' the cat'),  # cut from the left
  ('def', ' x' * 20),
  ('the cat', ' sat'),
  ('the cat', ' sat'),  # again
]


@pytest.fixture(scope='module')
def both(tmp_path_factory):
  """Our adapter and theirs, of one model in float32, and the folder of ours."""
  folder = tmp_path_factory.mktemp('tasks')
  torch.manual_seed(0)
  made = transformers.CohereForCausalLM(
    transformers.CohereConfig(**SIZES, attn_implementation='eager')
  ).eval()
  with torch.no_grad():
    for name, parameter in made.named_parameters():
      noise = torch.randn(parameter.shape)
      scale = 1 if 'embed' in name else 1.5 / parameter.shape[-1] ** 0.5
      parameter.copy_(1 + 0.3 * noise if 'norm' in name else scale * noise)
  made.save_pretrained(folder / 'hf')
  tokenizer = folders.make_tokenizer()
  tokenizer.save(folder / 'hf')
  done = run('bam_jax.convert', 'import-hf', f'--input={folder}/hf', f'--output={folder}/ours')
  assert done.returncode == 0, done.stderr
  words = tokenizers.Tokenizer.from_file(f'{folder}/hf/tokenizer.json')
  words.post_processor = tokenizers.processors.TemplateProcessing(
    single=f'{tokenizer.bos_token} $A', special_tokens=[(tokenizer.bos_token, tokenizer.bos_id)]
  )
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=words, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
  )
  theirs = HFLM(pretrained=made, tokenizer=fast, device='cpu', batch_size=1, max_length=LENGTH)
  return (
    adapter.Model(str(folder / 'ours'), comparison.Options(batch_size=4, window=LENGTH)),
    theirs,
    folder / 'ours',
  )


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, '-m', *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300,
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'HF_HUB_OFFLINE': '1'} | environment,
  )  # fmt: skip


def ask(kind: str, arguments: list[tuple]) -> list[Instance]:
  return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def test_loglikelihoods(both, capsys):
  ours, theirs, _ = both
  got = ours.loglikelihood(ask('loglikelihood', PAIRS))
  want = theirs.loglikelihood(ask('loglikelihood', PAIRS), disable_tqdm=True)
  assert [value for value, _ in got] == pytest.approx([value for value, _ in want], abs=1e-4)
  assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
  assert capsys.readouterr().err.count('contexts are truncated on the left') == 1
  ours.loglikelihood(ask('loglikelihood', PAIRS))
  assert 'contexts are truncated on the left' not in capsys.readouterr().err


def test_greedy_is_what_it_writes(both):
  """What theirs writes is greedy to ours, and nothing that ends otherwise."""
  ours, theirs, _ = both
  contexts = ['the cat', 'def', 'a']
  options = {'until': [], 'max_gen_toks': 5}
  written = theirs.generate_until(ask('generate_until', [(c, options) for c in contexts]), True)
  right, wrong = [], []
  for context, more in zip(contexts, written):
    start, tokens = ours.tok_encode(context), ours.tok_encode(context + more, False)
    tokens = tokens[len(start) - 1 :][:3]
    right.append((('', ''), start, tokens))
    wrong.append((('', ''), start, [*tokens[:-1], 2 if tokens[-1] != 2 else 3]))
  same = theirs._loglikelihood_tokens(right, disable_tqdm=True)
  assert [greedy for _, greedy in ours._loglikelihood_tokens(right)] == [g for _, g in same]
  assert [greedy for _, greedy in ours._loglikelihood_tokens(wrong)] == [False] * 3


def test_rolling(both, monkeypatch):
  ours, theirs, _ = both
  monkeypatch.setattr(theirs, 'add_bos_token', False)  # else its texts begin with two of them
  texts = [('the cat sat',), ('the mat ' * 60,), ('x',), ('def f(x): return ' * 15,)]
  got = ours.loglikelihood_rolling(ask('loglikelihood_rolling', texts))
  want = theirs.loglikelihood_rolling(ask('loglikelihood_rolling', texts), disable_tqdm=True)
  assert got == pytest.approx(want, abs=1e-4, rel=1e-5)


@pytest.mark.parametrize('options', [
  {'until': ['\n'], 'max_gen_toks': 12},
  {'until': [], 'max_gen_toks': 20, 'do_sample': False, 'temperature': 0.7},
  {'until': ['e', 't'], 'max_gen_toks': 30},
])  # fmt: skip
def test_text(both, options):
  ours, theirs, _ = both
  contexts = ['the cat', 'def f', 'x', 'the cat sat on the mat. ' * 20]
  requests = [(context, dict(options)) for context in contexts]
  want = theirs.generate_until(ask('generate_until', requests), disable_tqdm=True)
  assert ours.generate_until(ask('generate_until', requests)) == want
  assert any(want)


@pytest.mark.parametrize('name, value', [('num_beams', 4), ('repetition_penalty', 1.2)])
def test_what_it_cannot_do_is_not_left_out(both, name, value):
  ask_for = lambda v: ask('generate_until', [('the cat', {'max_gen_toks': 2, name: v})])
  with pytest.raises(UserError, match=f'{name}={value}'):
    both[0].generate_until(ask_for(value))
  assert both[0].generate_until(ask_for(1)) == both[0].generate_until(ask_for(None))


def test_a_mesh(both):
  ours, _, folder = both
  options = comparison.Options(mesh=config.Mesh(data=2, fsdp=2), batch_size=4, window=LENGTH)
  cut = adapter.Model(str(folder), options)
  requests = ask('loglikelihood', PAIRS)
  assert cut.loglikelihood(requests) == ours.loglikelihood(requests)


CHOICE = [
  {'context': 'the cat', 'choices': ['sat', 'mat'], 'answer': 0},
  {'context': 'def', 'choices': ['f', 'x', 'return'], 'answer': 2},
  {'context': 'the', 'choices': ['cat', 'mat', 'x'], 'answer': 1},
]


@pytest.fixture(scope='module')
def task(tmp_path_factory) -> Path:
  """A task, as a .yaml file beside its data."""
  folder = tmp_path_factory.mktemp('questions')
  data, made = folder / 'choice.jsonl', folder / 'my_choice.yaml'
  data.write_text('\n'.join(map(json.dumps, CHOICE)))
  kwargs = {'data_files': {'test': str(data)}, 'cache_dir': str(folder / 'cache')}
  facts = {
    'task': 'my_choice', 'dataset_path': 'json', 'dataset_kwargs': kwargs, 'test_split': 'test',
    'output_type': 'multiple_choice', 'doc_to_text': 'context', 'doc_to_choice': 'choices',
    'doc_to_target': 'answer', 'fewshot_split': 'test',
  }  # fmt: skip
  made.write_text(yaml.safe_dump(facts))
  return made


def scored(model, path) -> dict:
  """lm-eval's results of a task's file."""
  return lm_eval.simple_evaluate(model, tasks=[str(path)], log_samples=True)


def test_the_command(both, task, tmp_path):
  path = both[2]
  tasks = f'--tasks={task}'
  done = run('bam_jax.evaluate', f'--checkpoint={path}', tasks, f'--json={tmp_path}/facts')
  assert done.returncode == 0, done.stderr
  facts = json.loads((tmp_path / 'facts').read_text())
  [row] = facts['rows']
  assert set(row['results']) == {'my_choice'} and row['window'] == LENGTH
  want = scored(both[1], task)['results']['my_choice']['acc,none']
  assert row['results']['my_choice']['acc,none'] == want
  assert row['n-samples']['my_choice']['effective'] == len(CHOICE)
  assert 'my_choice' in done.stderr
  done = run('bam_jax.evaluate', f'--checkpoint={path}', '--tasks=no.yaml')
  assert done.returncode == 2 and '--tasks=no.yaml cannot be loaded' in done.stderr


def test_a_task_that_runs_programs_of_the_model_is_refused(both, task):
  other = task.with_name('code.yaml')
  other.write_text(task.read_text() + 'unsafe_code: true\n')
  with pytest.raises(UserError, match='my_choice runs programs .*: remove it, or run lm-eval'):
    session.run([str(both[2])], [str(other)], comparison.Options('float32'))


def test_the_group():
  """Its tasks are all known, with the paper's numbers of examples."""
  known = set(TaskManager().all_tasks)
  group = yaml.safe_load((Path(session.GROUPS) / 'bam_paper.yaml').read_text())
  shots = {}
  for member in group['task']:
    member = {'task': member} if isinstance(member, str) else member
    name = member.get('group', member['task'] if isinstance(member.get('task'), str) else '')
    names = member['task'] if isinstance(member.get('task'), list) else [name]
    assert set(names) <= known
    shots[name] = member.get('num_fewshot')
  assert shots.pop('legalbench_international_citizenship_questions', '') is None
  assert shots == {
    'gsm8k': 8, 'math': 4, 'nq_open': 0, 'triviaqa': 0, 'arc_easy': 0, 'arc_challenge': 0,
    'social_iqa': 0, 'piqa': 0, 'winogrande': 0, 'mmlu': 5,
  }  # fmt: skip
