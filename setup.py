"""Packaging. Upper bounds are the next versions that may break something."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="vit_jax",
    version="0.1.0",
    description="Vision Transformers in JAX: pretrain at scale, transfer, redraw the paper's plots",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["vit_jax", "vit_jax.*"]),
    python_requires=">=3.11,<3.14",
    install_requires=[
        "absl-py>=2.1,<3",
        "array_record>=0.8,<1",
        "flax>=0.12,<0.13",
        "grain>=0.2.12,<0.3",
        "importlib_resources>=6.0,<8",  # tensorflow-datasets needs it and doesn't say so
        "jax>=0.10,<0.13",
        "matplotlib>=3.8,<4",
        "ml_collections>=1.0,<2",
        "numpy>=2.0,<3",
        "optax>=0.2.6,<0.3",
        "orbax-checkpoint>=0.12,<1",
        "pillow>=11,<14",
        "scikit-learn>=1.5,<2",
        "scipy>=1.13,<2",
        "tensorflow-datasets>=4.9.8,<5",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        "cuda": ["jax[cuda12]"],
        "gcs": ["gcsfs>=2024.6"],
        "prepare": ["tensorflow-cpu>=2.18,<3"],
        "tensorboard": ["tensorboardX>=2.6,<3"],
        "test": [
            "chex>=0.1.90,<0.2",
            "hypothesis>=6.100,<7",
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.9,<1",
        ],
        "tpu": ["jax[tpu]"],
    },
)
