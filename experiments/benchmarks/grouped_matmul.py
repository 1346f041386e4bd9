"""Measures what a dropless grouped matmul costs, over one batched matmul of equal loads.

  python -m experiments.benchmarks.grouped_matmul [--rounds=9]
      time on this machine, CPU or GPU; 1 to 3 minutes
  JAX_PLATFORMS=cpu python -m experiments.benchmarks.grouped_matmul --tpu
      compile for a TPU v5e; no TPU needed, but jax[tpu]

N rows of uneven loads go through E matrices (D, F), forward, and forward with the gradients of rows
and matrices. Each round runs all ways in turn on equal work. A ratio is a way's time over that of
the floor in that round. The floor is the batched matmul (E, N/E, D) @ (E, D, F), which a dispatch
with a capacity of exactly N/E would run. Each of the two commands writes its own section of the
results file.
"""

import os
import pathlib
import re
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli, results
from experiments.benchmarks import common
from moejax.moe import grouped_matmul

COMMAND = 'python -m experiments.benchmarks.grouped_matmul'
RESULTS = common.RESULTS / 'grouped.md'
# (N, D, F, E). The first is the size of the miniature suites.
SHAPES = ((1000, 32, 128, 8), (4096, 512, 2048, 8), (4096, 256, 1024, 32))
GPU_SHAPES = ((100352, 768, 3072, 8), (100352, 768, 3072, 32))   # ViT-B/16, 256 images, top-2
TPU_SHAPES = ((4096, 512, 2048, 8), (4096, 512, 2048, 32))
PASSES = ('forward', 'forward and backward')


def forward(matmul: Callable) -> Callable:
  """(x, w, cotangent) -> y."""
  return lambda x, w, cotangent: matmul(x, w)


def backward(matmul: Callable) -> Callable:
  """(x, w, cotangent) -> y and both gradients."""
  def both(x, w, cotangent):
    y, pull = jax.vjp(matmul, x, w)
    return y, pull(cotangent)
  return both


def rows_of(N: int, E: int, rng) -> grouped_matmul.RowLayout:
  """Rows of N assignments in random order with uneven loads (Dirichlet(4) shares)."""
  expert = jnp.asarray(rng.choice(E, N, p=rng.dirichlet(np.full(E, 4.0))), jnp.int32)
  return grouped_matmul.sort_by_expert(expert, expert >= 0, E)


def workload() -> tuple[tuple, str]:
  """Shapes (N, D, F, E) and dtype that are timed on this machine's backend."""
  return (GPU_SHAPES, 'bfloat16') if jax.default_backend() == 'gpu' else (SHAPES, 'float32')


def ways(N: int, D: int, F: int, E: int) -> dict[str, tuple]:
  """{name: (matmul, x, w, cotangent)}, all on equally many rows but for padding."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), workload()[1])
  rows, w, n = rows_of(N, E, rng), draw(E, D, F), -(-N // E)
  P = len(rows.assignment)
  x, cotangent = draw(P, D), draw(P, F)
  return {
    'floor': (jnp.matmul, draw(E, n, D), w, draw(E, n, F)),
    'grouped': (rows.gmm, x, w, cotangent),
    # On N rows: it needs no padding.
    'ragged_dot': (lambda x, w: jax.lax.ragged_dot(x, w, rows.sizes), x[:N], w, cotangent[:N]),
  }


def ratios(shape: tuple, rounds: int, tick: Callable[[Any], Any] = lambda key: None
           ) -> dict[tuple[str, str], list[float]]:
  """{(way, pass): time over the floor's, one number a round}."""
  def work(program: Callable, operands: list) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(program(*operands))
  works = {(name, which): work(jax.jit(make(matmul)), operands)
           for name, (matmul, *operands) in ways(*shape).items()
           for which, make in zip(PASSES, (forward, backward))}
  took = common.in_turns(works, rounds, tick)
  return {(name, which): common.ratios(took[name, which], took['floor', which])
          for name, which in works if name != 'floor'}


def timed(rounds: int) -> str:
  """The section of a timing run on this machine's backend."""
  headers = ['N', 'D', 'F', 'E', 'rows / N', 'pass', 'grouped / floor', 'ragged_dot / floor']
  cell = lambda r: f'{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})'
  (shapes, dtype), table = workload(), []
  with common.progress(total=len(shapes) * 6 * (rounds + 1), unit='way') as bar:
    for shape in shapes:
      N, _, _, E = shape
      measured = ratios(shape, rounds, lambda key: bar.update())
      padded = len(rows_of(N, E, np.random.default_rng(0)).assignment) / N
      table += [[*shape, f'{padded:.2f}', which,
                 *(cell(measured[way, which]) for way in ('grouped', 'ragged_dot'))]
                for which in PASSES]
  return '\n'.join(common.table(headers, table, left=(5,))) + (
    f'\n\nMedian (least to greatest) of {rounds} rounds, {dtype}, {jax.devices()[0].device_kind}, '
    f'jax {jax.__version__}, {os.cpu_count()} cores with a load average of '
    f'{os.getloadavg()[0]:.0f} at the end. 1.00 is the batched matmul of equal loads, which would '
    'drop what does not fit; below 1 that one call was the slower. rows / N is the size of the '
    'buffer; the matmuls visit only the blocks in use.')


def compiled_facts(program: Callable, shapes: list, sharding) -> tuple[float, int, int]:
  """FLOPs, custom kernels, and bytes of temporaries that XLA:TPU reports for a program."""
  compiled = jax.jit(program, in_shardings=sharding, out_shardings=sharding).trace(*shapes).lower(
    lowering_platforms=('tpu',)).compile()
  kernels = len(re.findall(r'custom_call_target="tpu_custom_call"', compiled.as_text()))
  return (compiled.cost_analysis()['flops'], kernels,
          compiled.memory_analysis().temp_size_in_bytes)


PRODUCTS = {   # name -> (matmul, x, w, cotangent) -> product, all of 2 N D F FLOPs
    'forward': lambda matmul, x, w, c: matmul(x, w),
    'gradient of rows': lambda matmul, x, w, c: jax.vjp(lambda x: matmul(x, w), x)[1](c),
    'gradient of matrices': lambda matmul, x, w, c: jax.vjp(lambda w: matmul(x, w), w)[1](c)}


def for_tpu() -> str:
  """The section of programs compiled ahead of time for one TPU v5e. RuntimeError without libtpu."""
  from jax.experimental import topologies
  topology = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2')
  sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
  array = jax.ShapeDtypeStruct
  headers = ['N', 'D', 'F', 'E', 'what', *(
      header for way in ('grouped', 'ragged_dot')
      for header in (f'FLOPs / dense, {way}', 'kernels', 'temporaries, MB'))]
  table = []
  for N, D, F, E in common.progress(TPU_SHAPES, unit='shape'):
    rows = jax.eval_shape(lambda e, E=E: grouped_matmul.sort_by_expert(e, e >= 0, E),
                          array((N,), jnp.int32))
    for name, product in PRODUCTS.items():
      cells = []
      for P, groups, matmul in (
          (len(rows.assignment), rows, lambda rows: rows.gmm),
          (N, array((E,), jnp.int32), lambda sizes: lambda x, w: jax.lax.ragged_dot(x, w, sizes))):
        program = lambda groups, x, w, c, matmul=matmul, product=product: product(
            matmul(groups), x, w, c)
        shapes = [groups] + [array(s, jnp.bfloat16) for s in ((P, D), (E, D, F), (P, F))]
        flops, kernels, size = compiled_facts(program, shapes, sharding)
        cells += [f'{flops / (2 * N * D * F):.3f}', kernels, f'{size / 1e6:.1f}']
      table.append([N, D, F, E, name, *cells])
  return '\n'.join(common.table(headers, table, left=(4,))) + (
    '\n\nCompiled ahead of time for one chip of v5e:2x2 with libtpu (pip install "jax[tpu]", '
    f'JAX_PLATFORMS=cpu), bfloat16, jax {jax.__version__}; nothing was run, so '
    'these are no times. Dense is 2 N D F. A kernel counts as what it declares, all rows of its '
    'buffer. XLA counts the body of a loop once: the gradient of matrices, loops over pieces of '
    '8, 4, 2 and 1 blocks, shows one of each, 15 b / N of dense for blocks of b rows, and runs as '
    'many as are in use. '
    'ragged_dot becomes a kernel of no surplus FLOPs for the forward pass and for the gradient of '
    'rows, but E times the FLOPs for that of matrices: hence ragged_dot for the first two on TPU, '
    'and the loop for the third. megablox, which has a kernel for the third, is refused inside '
    'shard_map, whose check its kernels do not pass.')


def write_section(path: pathlib.Path, title: str, text: str) -> None:
  """Puts text under the heading `title` in a Markdown file, in place of what stood there."""
  old = path.read_text() if path.exists() else ''
  _, *pieces = re.split(r'^## (.*)\n', old, flags=re.MULTILINE)
  sections = dict(zip(pieces[::2], pieces[1::2])) | {title: text}
  results.write_text(path, '# Grouped matmul\n\n' + ''.join(
      f'## {title}\n\n{body.strip()}\n\n' for title, body in sections.items()).rstrip() + '\n')


def main(argv: list[str] | None = None) -> int:
  """Measures or compiles; returns the exit code. Raises ConfigError on a wrong flag."""
  parser = cli.Parser(COMMAND, __doc__)
  parser.add_argument('--rounds', type=int, default=9, help='timing rounds (%(default)s)')
  parser.add_argument('--tpu', action='store_true', help='compile for a TPU instead of timing')
  parser.add_argument('--results', type=pathlib.Path, default=RESULTS, metavar='FILE',
                      help='Markdown file to update (%(default)s)')
  args = parser.parse(argv)
  cli.check_at_least(1, '--rounds', args.rounds, 'More are more certain.')
  title, text = (('TPU, compiled and not run', for_tpu()) if args.tpu
                 else (f'Timed on {jax.default_backend()}', timed(args.rounds)))
  flag = '--tpu' if args.tpu else f'--rounds={args.rounds}'
  text += f'\n\nMade by `{COMMAND} {flag}`.'
  print(text)
  write_section(args.results, title, text)
  return 0


if __name__ == '__main__':
  cli.start(main)
