"""Starts Python processes by fork, from a process that has already imported JAX and moejax.

    done = fork_server.run([sys.executable, '-m', 'moejax.main', '--help'], env=os.environ)
    process = fork_server.Popen(['tests.train.killed', 'never'], stderr=subprocess.PIPE)

`run` and `Popen` take a command and some keywords of their namesakes in `subprocess`. The command
is [sys.executable, '-m', MODULE, *args], [sys.executable, '-c', CODE, *args] or [MODULE, *args].
This saves the two to three seconds of computing that imports take.

The server is that of Python's multiprocessing, one for each test process. It never starts a JAX
backend or a thread, so a fork is safe. Two things differ from a process of its own: JAX_* variables
and others that a library reads when it is imported must be those of the session; and output goes to
files, so it is read when the process has ended.
"""

import atexit
import contextlib
import functools
import io
import multiprocessing
import multiprocessing.forkserver
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import types
from unittest import mock

from tests import house

ROOT = house.ROOT
LIBRARIES = ('absl.app', 'matplotlib.font_manager', 'ml_collections.config_flags', 'PIL.ImageFont')
CONTEXT = multiprocessing.get_context('forkserver')


class Popen:
  """A forked process; see `subprocess.Popen`. Output is text.

  Args:
    command: see above.
    cwd, env: as in subprocess.
    stdout, stderr: None, subprocess.PIPE, or an open file; stderr also subprocess.STDOUT.
    input: text of standard input.
    text: there are no bytes.

  Raises:
    ValueError: for another command, or JAX_* variables that are not those of the session.
  """

  def __init__(self, command, *, cwd=None, env=None, stdout=None, stderr=None, input='',
               text=True):
    assert text
    words = [os.fspath(word) for word in command]
    words = words[1:] if words[:1] == [sys.executable] else ['-m', *words]
    if len(words) < 2 or words[0] not in ('-m', '-c') or '/' in words[1] and words[0] == '-m':
      raise ValueError(f'fork_server: got {command}, allowed: [sys.executable, -m, MODULE, ...], '
                       '[sys.executable, -c, CODE, ...] or [MODULE, ...]')
    env = dict(os.environ if env is None else env)
    for_jax = lambda variables: {k: v for k, v in variables.items() if k.startswith('JAX_')}
    if for_jax(env) != _start_server():
      raise ValueError(f'fork_server: got {for_jax(env)}, allowed: {_start_server()}, which JAX '
                       'read when it was imported. Use subprocess.')
    self._piped = [stream == subprocess.PIPE for stream in (stdout, stderr)]
    self._files = [tempfile.NamedTemporaryFile() if piped else stream   # noqa: SIM115
                   for piped, stream in zip(self._piped, (stdout, stderr))]
    paths = [file if file in (None, subprocess.STDOUT) else file.name for file in self._files]
    self._process = CONTEXT.Process(target=_become, daemon=True, args=(
        words, os.path.abspath(cwd or '.'), env, paths, input))
    self._process.start()
    self.pid, self.kill, self.terminate = (
        self._process.pid, self._process.kill, self._process.terminate)

  @property
  def returncode(self) -> int | None:
    return self._process.exitcode

  def poll(self) -> int | None:
    return self.returncode

  def send_signal(self, number: int) -> None:
    os.kill(self.pid, number)

  def wait(self, timeout: float | None = None) -> int:
    self._process.join(timeout)
    if self.returncode is None:
      raise subprocess.TimeoutExpired(str(self._process), timeout)
    return self.returncode

  def communicate(self, timeout: float | None = None) -> list[str | None]:
    """Waits; returns standard output and error, None where they are not PIPE."""
    self.wait(timeout)
    return [pathlib.Path(file.name).read_text() if piped else None
            for file, piped in zip(self._files, self._piped)]


def run(command, *, timeout=None, check=False, capture_output=False, **keywords
        ) -> subprocess.CompletedProcess:
  """`subprocess.run` for a Python command: runs it to its end, and returns code and output."""
  if capture_output:
    keywords |= {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
  process = Popen(command, **keywords)
  try:
    stdout, stderr = process.communicate(timeout)
  finally:
    process.kill()
  done = subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
  if check:
    done.check_returncode()
  return done


@functools.cache
def _start_server() -> dict[str, str]:
  """Starts the server, which imports moejax without its commands; returns its JAX_* variables."""
  modules = ['.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
             for path in sorted((ROOT / 'moejax').rglob('*.py'))
             if not house.is_command(path.read_text())]
  CONTEXT.set_forkserver_preload([*modules, *LIBRARIES])
  with contextlib.chdir(ROOT), mock.patch.dict(os.environ, OPENBLAS_NUM_THREADS='1'):
    multiprocessing.forkserver.ensure_running()
  return {k: v for k, v in os.environ.items() if k.startswith('JAX_')}


def _become(words: list[str], cwd: str, env: dict[str, str], paths: list, text: str) -> None:
  """Runs a command in a forked process."""
  for stream, path in zip((sys.stdout, sys.stderr), paths):
    if path is not None:
      target = 1 if path == subprocess.STDOUT else os.open(path, os.O_WRONLY | os.O_APPEND)
      os.dup2(target, stream.fileno())
  os.environ.clear()
  os.environ.update(env)
  os.chdir(cwd)
  kind, what, *args = words
  sys.stdin = io.StringIO(text)
  sys.path.insert(0, cwd)
  sys.argv = [kind, *args]
  try:
    if kind == '-m':
      sys.modules.pop(what, None)
      runpy.run_module(what, run_name='__main__', alter_sys=True)
    else:
      sys.modules['__main__'] = main = types.ModuleType('__main__')
      exec(compile(what, '<string>', 'exec'), main.__dict__)
  except KeyboardInterrupt:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)
  finally:
    atexit._run_exitfuncs()   # multiprocessing ends its processes without them
