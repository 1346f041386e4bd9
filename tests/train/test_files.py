"""JSON files of runs: read, missing, or damaged."""

import pytest

from moejax.config import ConfigError
from moejax.train import files

DAMAGED = {'empty': b'', 'cut': b'{"first_step": 1', 'zeros': bytes(20), 'no text': b'{"\xff": 1}',
           'list': b'[1, 2]', 'number': b'3', 'null': b'null', 'more': b'{}\n{}'}


def test_an_object_is_read(tmp_path):
  (tmp_path / 'run.json').write_text('{"first_step": 3}')
  assert files.read_json(tmp_path / 'run.json') == {'first_step': 3}


@pytest.mark.parametrize('content', DAMAGED.values(), ids=DAMAGED)
def test_damage_is_one_line_that_names_the_file_and_the_fix(tmp_path, content):
  (tmp_path / 'run.json').write_bytes(content)
  with pytest.raises(ConfigError) as error:
    files.read_json(tmp_path / 'run.json', 'config.x', 'Do this.')
  said = str(error.value)
  assert said.startswith(f"config.x: got '{tmp_path}', allowed: a run whose run.json can be read. "
                         'It is damaged: ')
  assert said.endswith('. Do this.') and '\n' not in said
  with pytest.raises(ConfigError, match='^workdir: .* Delete that file and start that run again'):
    files.read_json(tmp_path / 'run.json')


def test_an_object_without_what_is_needed_is_damaged(tmp_path):
  (tmp_path / 'run.json').write_text('{"a": 1}')
  assert files.read_json(tmp_path / 'run.json', needs=['a']) == {'a': 1}
  with pytest.raises(ConfigError, match='run.json can be read. It is damaged: it has no b, c. '):
    files.read_json(tmp_path / 'run.json', needs=['a', 'b', 'c'])


@pytest.mark.parametrize('path', ['run.json', 'none/run.json', 'file/run.json'])
def test_what_is_not_there(tmp_path, path):
  (tmp_path / 'file').touch()
  with pytest.raises(ConfigError, match='config.x: .*the directory of a run, with run.json in it'):
    files.read_json(tmp_path / path, 'config.x')
