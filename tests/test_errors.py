"""What a user is told of an error, and what is not for a user to fix."""

import sys

import jax
import pytest

from bam_jax import errors

MEMORY = 'out of memory (RESOURCE_EXHAUSTED: 9 bytes): reduce the batch size or the model.'


@pytest.mark.parametrize(
  'error, sentence',
  [
    (errors.UserError('Do this.'), 'Do this.'),
    (FileNotFoundError(2, 'No such file', '/a'), '/a cannot be used: No such file.'),
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 9 bytes\nstack'), MEMORY),
    (MemoryError('RESOURCE_EXHAUSTED: 9 bytes'), MEMORY),
    (OSError('of a socket'), None),
    (jax.errors.JaxRuntimeError('INTERNAL: RESOURCES'), None),
    (ValueError('RESOURCE_EXHAUSTED'), None),
    (KeyError('x'), None),
  ],
)
def test_what_a_user_can_fix(error, sentence):
  assert errors.sentence(error) == sentence


def test_the_loss_of_a_process_has_several_errors():
  assert errors.of_jax(jax.errors.JaxRuntimeError('INTERNAL: Gloo'))
  assert errors.of_jax(ValueError('UNKNOWN: Gloo all-reduce failed'))
  assert not errors.of_jax(ValueError('UNKNOWN letters'))
  assert not errors.of_jax(OSError('UNKNOWN: '))
  assert not errors.of_jax(None)


def test_the_program_is_named_as_it_was_typed(monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['/x/bam_jax/evaluate/__main__.py', '--a'])
  assert errors.program_name() == 'bam_jax.evaluate'
  monkeypatch.setattr(sys, 'argv', ['/x/bam_jax/convert.py', '--a'])
  monkeypatch.setattr(errors, 'subcommand', 'upcycle')
  assert errors.program_name() == 'bam_jax.convert upcycle'
