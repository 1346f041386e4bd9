"""Starts Python processes by fork, from a process that has already imported JAX and moejax.

    done = fork_server.run([sys.executable, '-m', 'moejax.main', '--help'], text=True,
                           capture_output=True, env=os.environ | {'XLA_FLAGS': ''}, timeout=60)
    process = fork_server.Popen(['tests.train.killed', 'never'], stderr=subprocess.PIPE)

`run` and `Popen` take a command and the keywords of their namesakes in `subprocess`. The command is
[sys.executable, '-m', MODULE, *args], [sys.executable, '-c', CODE, *args] or [MODULE, *args]. A
forked process saves the two to three seconds of computing that imports take.

The server never starts a JAX backend and never has a second thread (it refuses to start with one),
so a fork is safe, and each child reads JAX_PLATFORMS and XLA_FLAGS for itself. It is started by the
first call in a test process and ends with that process, which then ends its children too.

Three things differ from a process of its own:
- BLAS has one thread in the server, and hence in its children.
- Modules of moejax are those of this tree: a child whose path leads to others is an error.
- Variables that a library reads when it is loaded (MALLOC_*, PYTHON*, MPLBACKEND) have no effect.
  PYTHONPATH has, and so has what JAX reads: its configuration is read anew from the environment.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import importlib.machinery
import json
import os
import pathlib
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIBRARIES = ('absl.app', 'matplotlib.font_manager', 'ml_collections.config_flags', 'PIL.ImageFont')
LARGEST = 1 << 17   # bytes of a request; Linux takes 200 KB


# In the process that wants another: the client.

class Popen(subprocess.Popen):
  """A process forked by the server; see `subprocess.Popen`.

  Its parent is the server, which sends pid and exit status through a pipe of the process's own:
  three methods of the base class, which would fork and wait, are replaced.

  Raises:
    ValueError: for a command that is not one of Python, or a keyword that is not supported.
    RuntimeError: the server ended.
  """

  def __init__(self, command, **keywords):
    self._command = _python(command)
    unknown = set(keywords) - {'stdin', 'stdout', 'stderr', 'text', 'encoding', 'errors', 'bufsize',
                               'universal_newlines', 'cwd', 'env', 'start_new_session'}
    if unknown:
      raise ValueError(f'fork_server.Popen: {", ".join(sorted(unknown))}: not supported')
    super().__init__(command, **keywords)

  def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo,
                     creationflags, shell, *pipes_and_rest):
    p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, _, _, _, _, _, new_session, *_ = (
        pipes_and_rest)
    self._status, status = os.pipe()
    request = {'command': self._command, 'cwd': os.path.abspath(cwd or '.'), 'session': new_session,
               'env': {os.fsdecode(k): os.fsdecode(v)
                       for k, v in (os.environ if env is None else env).items()}}
    streams = [own if own != -1 else standard
               for standard, own in enumerate((p2cread, c2pwrite, errwrite))]
    try:
      socket.send_fds(_server(), [json.dumps(request).encode()], [*streams, status])
    finally:
      os.close(status)
      self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
    self.pid = self._receive()
    self._child_created = True

  def _receive(self) -> int:
    """The next number of the status pipe: the pid, then the exit status as `waitpid` has it."""
    if not (data := os.read(self._status, 4)):   # written at once, so never torn
      raise RuntimeError('the fork server ended; its messages are among this process\'s')
    return int.from_bytes(data, 'little', signed=True)

  def _try_wait(self, wait_flags):
    if wait_flags & os.WNOHANG and not select.select([self._status], [], [], 0)[0]:
      return 0, 0
    status = self._receive()
    os.close(self._status)
    return self.pid, status

  def _internal_poll(self, _deadstate=None, **_):
    if self.returncode is None and self._waitpid_lock.acquire(False):
      try:
        if self.returncode is None:
          pid, status = self._try_wait(os.WNOHANG)
          if pid == self.pid:
            self._handle_exitstatus(status)
      finally:
        self._waitpid_lock.release()
    return self.returncode


def run(command, *, input=None, timeout=None, check=False, capture_output=False,
        **keywords) -> subprocess.CompletedProcess:
  """`subprocess.run` for a Python command: runs it to its end, and returns code and output."""
  if capture_output:
    keywords |= {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
  if input is not None:
    keywords['stdin'] = subprocess.PIPE
  with Popen(command, **keywords) as process:
    try:
      stdout, stderr = process.communicate(input, timeout)
    except BaseException:   # TimeoutExpired and Ctrl-C among them
      process.kill()
      raise
  done = subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
  if check:
    done.check_returncode()
  return done


def _python(command) -> list[str]:
  """['-m', MODULE, *args] or ['-c', CODE, *args] of a command."""
  words = [os.fspath(word) for word in command]
  words = words[1:] if words[:1] == [sys.executable] else ['-m', *words]
  if len(words) < 2 or words[0] not in ('-m', '-c') or '/' in words[1] and words[0] == '-m':
    raise ValueError(f'fork_server: got {command}, allowed: [sys.executable, -m, MODULE, ...], '
                     '[sys.executable, -c, CODE, ...] or [MODULE, ...]')
  return words


@functools.cache
def _server() -> socket.socket:
  """Starts the server of this process; the socket takes requests, and its end is the server's."""
  ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
  env = {k: v for k, v in os.environ.items()
         if not k.startswith(('JAX_', 'XLA_', 'TF_CPP_')) and k != 'PYTHONPATH'}
  with theirs:
    process = subprocess.Popen(
        [sys.executable, '-c', 'import sys\nfrom tests import fork_server\n'
         f'fork_server.serve({theirs.fileno()})'], cwd=ROOT, pass_fds=[theirs.fileno()],
        env=env | {'OPENBLAS_NUM_THREADS': '1'}, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL)
  def end():
    ours.close()
    process.wait()
  atexit.register(end)
  return ours


# In the server.

def preload() -> None:
  """Imports what most processes import: the libraries, and moejax without its commands."""
  for path in sorted((ROOT / 'moejax').rglob('*.py')):
    if "__name__ == '__main__'" not in path.read_text():
      name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
      importlib.import_module(name.removesuffix('.__init__'))
  for name in LIBRARIES:
    importlib.import_module(name)


def why_unsafe() -> str:
  """What makes a fork of this process unsafe; '' if nothing does."""
  from jax._src import xla_bridge
  if xla_bridge._backends:
    return f'a JAX backend was started: {", ".join(xla_bridge._backends)}'
  threads = len(os.listdir('/proc/self/task'))
  return '' if threads == 1 else f'{threads} threads run'


def serve(fd: int) -> None:
  """Forks a child for each request from the socket `fd`.

  Returns in a child, when its command has ended. In the server itself it ends the process, and all
  children, when the client closes its end.
  """
  requests = socket.socket(fileno=fd)
  installed, before = sys.path[1:], dict(os.environ)   # the first is the directory of the start
  preload()
  defaults = {name: value for name, value in os.environ.items() if name not in before}
  if reason := why_unsafe():
    sys.exit(f'fork_server: {reason} after imports, so no fork is safe')
  gc.freeze()   # so that a child's garbage collection touches, and so copies, none of it
  signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])   # of a terminal: for the children
  wakeup, alarm = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
  signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
  signal.signal(signal.SIGCHLD, lambda *_: None)
  running = {}   # pid -> status pipe
  while True:
    ready, _, _ = select.select([requests, wakeup], [], [])
    if wakeup in ready:
      os.read(wakeup, 4096)
      _reap(running)
    if requests not in ready:
      continue
    message, fds, _, _ = socket.recv_fds(requests, LARGEST, 4, socket.MSG_CMSG_CLOEXEC)
    if not message:
      for pid in running:
        os.kill(pid, signal.SIGKILL)
      os._exit(0)
    *streams, status = fds
    if (pid := os.fork()) == 0:
      signal.set_wakeup_fd(-1)
      requests.close()
      for other in (wakeup, alarm, status, *running.values()):
        os.close(other)
      request = json.loads(message)
      request['env'] = defaults | request['env']
      return _become(request, streams, installed)
    running[pid] = status
    _send(status, pid)
    for stream in streams:
      os.close(stream)


def _reap(running: dict[int, int]) -> None:
  """Sends the exit status of each child that has ended to its client."""
  while running:
    pid, status = os.waitpid(-1, os.WNOHANG)
    if not pid:
      return
    pipe = running.pop(pid)
    _send(pipe, status)
    os.close(pipe)


def _send(pipe: int, number: int) -> None:
  with contextlib.suppress(BrokenPipeError):   # nobody waits for that child
    os.write(pipe, number.to_bytes(4, 'little', signed=True))


# In a child.

def _become(request: dict, streams: list[int], installed: list[str]) -> None:
  """Makes the process what its request says and runs the command.

  Args:
    request: command, env, cwd, session.
    streams: what standard input, output and error are to be.
    installed: the interpreter's own entries of sys.path.
  """
  if request['session']:
    os.setsid()
  for standard, stream in enumerate(streams):
    os.dup2(stream, standard)
    os.close(stream)
  os.environ.clear()
  os.environ.update(request['env'])
  os.chdir(request['cwd'])
  kind, what, *args = request['command']
  paths = filter(None, os.environ.get('PYTHONPATH', '').split(os.pathsep))
  sys.path[:] = [request['cwd'] if kind == '-m' else '', *paths, *installed]
  sys.argv = [kind, *args]
  _reset_imported()
  signal.signal(signal.SIGCHLD, signal.SIG_DFL)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
  if kind == '-m':
    sys.modules.pop(what, None)
    runpy.run_module(what, run_name='__main__', alter_sys=True)
  else:
    sys.modules['__main__'] = main = types.ModuleType('__main__')
    exec(compile(what, '<string>', 'exec'), main.__dict__)


def _reset_imported() -> None:
  """Repeats what libraries read from the environment, or drew, when they were imported."""
  import jax
  import numpy as np
  np.random.seed()
  tempfile.tempdir = None
  for name, value in jax.config.values.items():
    text = os.environ.get(name.upper())
    if text is not None:
      read = (lambda t: t.lower() in ('y', 'yes', 't', 'true', 'on', '1')
              ) if isinstance(value, bool) else type(value) if value is not None else str
      jax.config.update(name, read(text))
  found = importlib.machinery.PathFinder.find_spec('moejax')
  if found and str(ROOT / 'moejax') not in found.submodule_search_locations:
    sys.exit(f'fork_server: {found.submodule_search_locations[0]} is not of {ROOT}: set cwd or '
             'PYTHONPATH, or use subprocess')
