"""Does it matter how a run is spread over devices?

Claim (moejax 2026, tests/train/test_parallel.py): a mesh of jax.sharding and pmap take the same
step. So what dense_vs_upcycled finds under pmap, as every suite trains, must come out on a mesh
too: its two arms at equal extra FLOPs once more, from the same parents, with the same batches.

The two compile to different programs. Where these add in the same order the losses are the same to
the last digit; where not, thousands of steps make of a rounding error what another seed makes. The
difference between the two ways is thus also how far apart two runs of the same arm can end.

Refuted if the losses on the mesh are others by more than the margin, or if the sign of what
upcycling brings is another there.
"""

from experiments import protocol
from experiments.suite import Suite

SOURCE = 'moejax 2026, tests/train/test_parallel.py'
WAYS = ('pmap', 'mesh')


def get_suite(scale: str) -> Suite:
  arms, claims = [], []
  for regime in (protocol.text(scale), protocol.vision(scale)):
    for pair in regime.pairs():
      for way in WAYS:
        how = {'changes': {'parallel': way}}
        up = pair.upcycled(**how)
        arms += [pair.arm(f'dense, equal FLOPs, {way}', pair.matched_dense(up, **how),
                          reference=way == WAYS[0]),
                 pair.arm(f'upcycled, {way}', up)]
    claims += [
        regime.claim(f'{name} ends on the mesh where it does under pmap', SOURCE, 'the same step',
                     f'{name}, mesh', '~', f'{name}, pmap')
        for name in ('dense, equal FLOPs', 'upcycled')]
    claims.append(regime.claim(
        'on the mesh too, upcycled beats dense continuation at equal extra FLOPs',
        'Komatsuzaki et al. 2023, Fig. 2', 'a gap that grows with the extra budget; no figures',
        'upcycled, mesh', '<', 'dense, equal FLOPs, mesh'))
  return Suite('mesh', scale, tuple(arms), tuple(claims), plot='points')
