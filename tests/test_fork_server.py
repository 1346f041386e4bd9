"""A forked process is what subprocess would have started, but for the time of its imports."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from tests import fork_server

STATE = '''
import json, os, sys
import jax
print(json.dumps({
    'argv': sys.argv, 'cwd': os.getcwd(), 'environ': dict(os.environ), 'main': __name__,
    'config': {k: str(v) for k, v in jax.config.values.items()}, 'devices': len(jax.devices())}))
'''


def code(text, *args, **keywords):
  return fork_server.run([sys.executable, '-c', text, *args], capture_output=True, timeout=60,
                         **keywords)


def test_a_fork_is_safe_after_all_imports():
  """A new child has no backend and no thread, so the server has none either."""
  script = ('import os, sys\nloaded = "moejax.train.loop" in sys.modules\n'
            'from jax._src import xla_bridge\n'
            'print(loaded, len(xla_bridge._backends), len(os.listdir("/proc/self/task")))\n'
            'import jax; jax.devices(); print(list(xla_bridge._backends))')
  assert code(script).stdout == "True 0 1\n['cpu']\n"


def test_a_child_has_the_state_of_a_new_process(tmp_path):
  """Arguments, environment, JAX's configuration and devices."""
  env = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=3', 'OTHER': '1'}
  (tmp_path / 'state.py').write_text(STATE)
  for command in (['-c', STATE, 'a', '--b'], ['-m', 'state', 'a']):
    forked, new = (json.loads(module.run(
        [sys.executable, *command], env=env, cwd=tmp_path, capture_output=True, check=True).stdout)
        for module in (fork_server, subprocess))
    assert forked['devices'] == 3 and forked['environ'].pop('OTHER') == '1'
    for state in (forked, new):   # of the start of Python
      state['environ'] = {k: v for k, v in state['environ'].items() if k in env and k != 'OTHER'}
    assert forked == new


@pytest.mark.parametrize('script, returncode', [
    ('', 0), ('import sys; sys.exit(7)', 7), ('raise SystemExit("why")', 1), ('1 / 0', 1),
    ('import os; os.abort()', -signal.SIGABRT), ('raise KeyboardInterrupt', -signal.SIGINT),
    ('import atexit; atexit.register(print, "end"); print("begin")', 0)])
def test_exit_codes_and_output(script, returncode):
  done, new = (module.run([sys.executable, '-c', script], capture_output=True)
               for module in (fork_server, subprocess))
  assert done.returncode == returncode == new.returncode
  assert done.stdout == new.stdout.decode()
  if returncode != -signal.SIGINT:   # without its traceback
    assert done.stderr.splitlines()[-1:] == new.stderr.decode().splitlines()[-1:]


def test_streams_and_check(tmp_path):
  echo = 'import sys; print(sys.stdin.read().upper()); print("no", file=sys.stderr)'
  assert code(echo, input='yes').stdout == 'YES\n'
  with (tmp_path / 'log').open('w') as log:
    assert fork_server.Popen([sys.executable, '-c', echo], stdout=log, stderr=log).wait(60) == 0
  assert sorted((tmp_path / 'log').read_text().split()) == ['no']
  with pytest.raises(subprocess.CalledProcessError):
    code('import sys; sys.exit(3)', check=True)


def test_signals_and_timeouts_reach_the_child(tmp_path):
  catch = ('import pathlib, signal, sys, time\n'
           'signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))\n'
           'pathlib.Path(sys.argv[1]).touch()\ntime.sleep(60)')
  process = fork_server.Popen([sys.executable, '-c', catch, str(tmp_path / 'ready')])
  while not (tmp_path / 'ready').exists():
    assert process.poll() is None
  with pytest.raises(subprocess.TimeoutExpired):
    process.wait(0.1)
  process.terminate()
  assert process.wait(30) == process.poll() == 42
  with pytest.raises(subprocess.TimeoutExpired):
    fork_server.run([sys.executable, '-c', 'import time; time.sleep(60)'], timeout=0.2)


def test_children_run_side_by_side_and_apart():
  """Threads share the server, and a child changes nothing for the next."""
  script = ('import os, sys, jax\nprint(hasattr(jax, "seen"), "SEEN" in os.environ)\n'
            'jax.seen, os.environ["SEEN"] = 1, "1"')
  printed = []
  threads = [threading.Thread(target=lambda: printed.append(code(script).stdout))
             for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert printed == ['False False\n'] * 4


def test_what_cannot_be_forked_is_refused():
  for command in (['/bin/true'], [sys.executable], [sys.executable, 'file.py']):
    with pytest.raises(ValueError, match='allowed: .sys.executable, -m, MODULE'):
      fork_server.run(command)
  with pytest.raises(ValueError, match='which JAX read when it was imported'):
    fork_server.run(['x'], env=os.environ | {'JAX_ENABLE_X64': '1'})
