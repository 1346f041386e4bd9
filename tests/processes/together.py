"""One of two processes of two devices each: checks what processes hand to each other.

python -m tests.processes.together PORT PROCESS FILE. Each writes what it found as JSON; then
process 1 fails, and process 0 waits as in a collective.
"""

import json
import sys
import time

import jax
import numpy as np

from moejax import models
from moejax.cluster import processes as hosts_lib
from moejax.config import ConfigError
from moejax.evaluation import evaluate
from moejax.models import t5
from moejax.moe.config import MoEConfig
from moejax.sharding import MeshConfig
from moejax.train import parallel
from tests.train import killed

CONFIG = t5.config('tiny', encoder_layers=1, decoder_layers=1,
                   encoder_moe=MoEConfig(layers='0', num_experts=4, group_size=2 * 5),
                   decoder_moe=MoEConfig(layers='0', num_experts=4, router='top_k'))
MESHES = {'data': {}, 'expert': {'expert': 2}, 'across': {'data': 1, 'model': 4}}


def sources(B=8):
  """Sources of all lengths, one of them filler."""
  rng = np.random.default_rng(0)
  source = rng.integers(1, 64, (B, 5)) * (np.arange(5) < rng.integers(1, 6, (B, 1)))
  weight = np.ones((B, 4), np.float32)
  weight[3] = source[3] = 0
  return {'encoder_input': source.astype(np.int32), 'weight': weight,
          'target': np.zeros((B, 4), np.int32), 'index': np.arange(B, dtype=np.int32)}


def decoded(devices) -> dict:
  """Texts of all examples; and the examples as put together on the host."""
  size = 8 // devices.hosts
  own = {k: v[devices.host * size:][:size] for k, v in sources().items()}
  model = models.build(CONFIG)
  params = devices.init(model.init, jax.random.key(0))
  step = devices.jit(evaluate.make_decode_step(model, evaluate.DecodeConfig(), devices.gather))
  out = jax.device_get(step(params, devices.put(own)))
  return {'host': [devices.host, devices.hosts], 'ids': out['ids'].tolist(),
          'real': out['real'].tolist(),
          'index': parallel.all_examples(devices, {'index': own['index']})['index'].tolist()}


def stops(hosts) -> list:
  """What each of 8 steps is told to stop for, when process 1 gets signal 15 in step 3."""
  return [hosts.stop(15 if hosts.process == 1 and step >= 3 else None) for step in range(8)]


def differing(hosts) -> str:
  hosts.same('data', 'equal', 'fix')
  try:
    hosts.same('data', f'of {hosts.process}', 'Install the same.')
  except ConfigError as error:
    return str(error)
  return 'nothing'


def main(port: str, process: str, file: str) -> None:
  hosts = hosts_lib.join(hosts_lib.Launch(
      coordinator=f'localhost:{port}', processes=2, process=int(process), lost_seconds=20))
  killed.keep_compiled()
  with hosts.leaving():
    found = {name: decoded(parallel.make('mesh', MeshConfig(**axes)))
             for name, axes in MESHES.items()}
    found['pmap'] = decoded(parallel.make('pmap', MeshConfig()))
    found['stops'] = stops(hosts)
    found['differing'] = differing(hosts)
    with open(f'{file}.{process}', 'w', encoding='utf-8') as out:
      json.dump(found, out)
    if hosts.process == 1:
      raise ConfigError('config.data: no such file')
    time.sleep(60)


if __name__ == '__main__':
  main(*sys.argv[1:])
