"""A forked process is what subprocess would have started, but for the time of its imports."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests import fork_server

STATE = '''
import json, os, sys
import jax
print(json.dumps({
    'argv': sys.argv, 'path': sys.path, 'cwd': os.getcwd(), 'environ': dict(os.environ),
    'main': __name__, 'config': {k: str(v) for k, v in jax.config.values.items()},
    'devices': len(jax.devices()), 'threefry': jax.random.key_data(jax.random.key(3)).tolist()}))
'''


def code(text, *args, **keywords):
  return fork_server.run([sys.executable, '-c', text, *args], capture_output=True, text=True,
                         timeout=60, **keywords)


def test_a_fork_is_safe_after_all_imports():
  """In the server: no backend, no thread. In a child: a backend and its threads, as in any."""
  script = ('from tests import fork_server\nprint(repr(fork_server.why_unsafe()))\n'
            'import jax; jax.devices()\nprint(fork_server.why_unsafe())')
  assert code(script).stdout == "''\na JAX backend was started: cpu\n"


def test_a_child_has_the_state_of_a_new_process(tmp_path):
  """Arguments, path, environment, JAX's configuration and devices."""
  env = {k: v for k, v in os.environ.items() if not k.startswith('JAX_')} | {
      'XLA_FLAGS': '--xla_force_host_platform_device_count=3', 'PYTHONPATH': f'{fork_server.ROOT}',
      'JAX_PLATFORMS': 'cpu', 'JAX_ENABLE_X64': 'true', 'JAX_DEFAULT_PRNG_IMPL': 'rbg',
      'JAX_COMPILATION_CACHE_DIR': str(tmp_path), 'JAX_NUMPY_RANK_PROMOTION': 'warn',
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.5', 'JAX_TRACEBACK_FILTERING': 'off',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'}
  (tmp_path / 'state.py').write_text(STATE)
  for command in (['-c', STATE, 'a', '--b'], ['-m', 'state', 'a']):
    command = [sys.executable, *command]
    kept = {'env': env, 'cwd': tmp_path, 'capture_output': True, 'text': True, 'check': True}
    forked, new = (json.loads(module.run(command, **kept).stdout)
                   for module in (fork_server, subprocess))
    assert forked['devices'] == 3 and forked['config']['jax_enable_x64'] == 'True'
    for state in (forked, new):   # set by the start of Python, or by a library that one loads
      for name in ('LC_CTYPE', 'CRC32C_SW_MODE'):
        state['environ'].pop(name, None)
    assert {k: v for k, v in forked.items() if v != new[k]} == {}
    assert forked.keys() == new.keys()


@pytest.mark.parametrize('script, returncode, said', [
    ('', 0, ''), ('import sys; sys.exit(7)', 7, ''), ('raise SystemExit("why")', 1, 'why\n'),
    ('import os; os.abort()', -signal.SIGABRT, None),
    ('import atexit; atexit.register(print, "end"); print("begin")', 0, None),
    ('raise KeyboardInterrupt', -signal.SIGINT, None), ('1 / 0', 1, None)])
def test_exit_codes_and_output(script, returncode, said):
  done, new = (module.run([sys.executable, '-c', script], capture_output=True, text=True)
               for module in (fork_server, subprocess))
  assert done.returncode == returncode == new.returncode and done.stdout == new.stdout
  assert said is None or done.stderr == said == new.stderr
  assert done.stderr.splitlines()[-1:] == new.stderr.splitlines()[-1:]


def test_input_streams_and_check():
  echo = 'import sys; print(sys.stdin.read().upper()); print("no", file=sys.stderr)'
  assert code(echo, input='yes').stdout == 'YES\n'
  both = fork_server.run([sys.executable, '-c', echo], stdin=subprocess.DEVNULL,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  assert sorted(both.stdout.split()) == ['no'] and both.stderr is None
  with pytest.raises(subprocess.CalledProcessError):
    code('import sys; sys.exit(3)', check=True)


def test_signals_and_timeouts_reach_the_child():
  catch = ('import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(42))\n'
           'print("ready", flush=True)\ntime.sleep(60)')
  process = fork_server.Popen([sys.executable, '-c', catch], stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == 'ready\n' and process.poll() is None
  with pytest.raises(subprocess.TimeoutExpired):
    process.wait(0.1)
  process.terminate()
  assert process.wait(30) == process.poll() == 42
  process.stdout.close()
  for number in (signal.SIGINT, signal.SIGKILL):   # sent at once: neither is lost
    process = fork_server.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],
                                stderr=subprocess.DEVNULL, start_new_session=True)
    process.send_signal(number)
    assert process.wait(30) == -number
  with pytest.raises(subprocess.TimeoutExpired):
    fork_server.run([sys.executable, '-c', 'import time; time.sleep(60)'], timeout=0.2)


def test_children_run_side_by_side_and_apart():
  """Threads share the server; a child changes nothing for the next; random numbers differ."""
  script = ('import os, sys, numpy as np, jax\nos.environ["SEEN"] = "1"\n'
            'print("SEEN" in sys.argv[1], hasattr(jax, "seen"), np.random.random())\njax.seen = 1')
  said = []
  threads = [threading.Thread(target=lambda: said.append(
      code(script, str(dict(os.environ))).stdout.split())) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert [words[:2] for words in said] == [['False', 'False']] * 4
  assert len({words[2] for words in said}) == 4


def test_a_child_ends_with_the_test_process():
  script = ('import subprocess, sys, time\nfrom tests import fork_server\n'
            'print(fork_server.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid)')
  pid = int(subprocess.run([sys.executable, '-c', script], cwd=fork_server.ROOT,
                           capture_output=True, text=True, check=True, timeout=60).stdout)
  for _ in range(100):
    if not os.path.exists(f'/proc/{pid}'):
      return
    time.sleep(0.1)
  raise AssertionError('it still runs')


def test_what_cannot_be_forked_is_refused(tmp_path):
  for command in (['/bin/true'], [sys.executable], [sys.executable, 'file.py']):
    with pytest.raises(ValueError, match='allowed: .sys.executable, -m, MODULE'):
      fork_server.run(command)
  with pytest.raises(ValueError, match='preexec_fn: not supported'):
    fork_server.Popen(['x'], preexec_fn=print)
  (tmp_path / 'moejax').mkdir()
  (tmp_path / 'moejax/__init__.py').write_text('')
  done = code('', cwd=tmp_path)
  assert done.returncode == 1 and 'is not of' in done.stderr
