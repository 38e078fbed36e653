"""Sets up every test: the CPU (unless JAX_PLATFORMS says otherwise), strict ranks, fixed threads.

Warnings are errors by `filterwarnings` in pyproject.toml, on the CPU. GPU tests lie in tests/gpu and need neither
hypothesis nor an installed package: `JAX_PLATFORMS=cuda pytest -m gpu`. Without PyTorch its tests are skipped:
`make test-newest`.
"""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# One thread a worker: results do not depend on the machine's size, and xdist workers do not fight over its cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["EAGLE_JAX_CACHE"] = str(Path(__file__).parents[1] / ".pytest_cache" / "jax-commands")  # of started commands
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax  # reads XLA_FLAGS at the first use of a device, below
import pytest

from tests import aot, array_types

try:
    import hypothesis
except ImportError:  # on a machine with a GPU, set up for nothing but decoding
    hypothesis = None  # type: ignore[assignment]

# The versions of constraints.txt. `make test-newest` has later ones, a machine with a GPU its own.
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
PINNED = f"jax=={jax.__version__}" in CONSTRAINTS.read_text().split()

if os.environ["JAX_PLATFORMS"] == "cpu":
    # Compiling is most of the time. LLVM's optimisations change how fast a program runs here, not what XLA made of it.
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
    # XLA's older emitters take half the time for a large program. Later releases of jaxlib lack them, and abort at an
    # unknown flag. `make test` runs some tests without this flag, as users do.
    if PINNED and os.environ.get("XLA_EMITTERS") != "default":
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
        # Workers are as many as cores, so compiling in several threads only costs more.
        os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"

# Tracing allocates many objects and frees few: collecting as often as Python does takes a tenth of the time.
gc.set_threshold(200_000, 20, 100)

aot.find_compilers()
array_types.check_rooms()
jax.config.update("jax_numpy_rank_promotion", "raise")
# Workers and later runs share compiled programs. The size limit also turns on the cache's lock.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
jax.config.update("jax_compilation_cache_max_size", 2**30)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)  # enough for a mesh of three axes

if hypothesis is not None:
    hypothesis.settings.register_profile("tests", derandomize=True, deadline=None, database=None)
    hypothesis.settings.load_profile("tests")


# Linux limits a process to 65530 memory maps by default; a compiled program takes hundreds.
MAPS = Path("/proc/self/maps")
MANY_MAPS = 25_000
QUICK = 0.1  # seconds in which a test compiles next to nothing; reading the maps may take a third of that


@pytest.fixture(autouse=True)
def forget_programs():
    """Drops compiled programs before their memory maps reach the limit, where XLA aborts."""
    start = time.monotonic()
    yield
    if time.monotonic() - start > QUICK and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def golden() -> Path:
    """Returns the folder of tensors that the PyTorch reference computed."""
    return Path(__file__).parent / "golden"


def pytest_configure(config: pytest.Config) -> None:
    """Turns warnings into errors with pinned versions; with others only those of our modules, on a CPU."""
    if os.environ["JAX_PLATFORMS"] != "cpu":
        config.addinivalue_line("filterwarnings", "default")
    elif not PINNED:
        config.addinivalue_line("filterwarnings", "default:::(?!eagle_jax|tests)")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Collects only tests/gpu with `-m gpu`: other files import packages that a GPU machine may lack."""
    gpu = Path(__file__).parent / "gpu"
    if config.option.markexpr == "gpu" and collection_path.suffix == ".py" and gpu not in collection_path.parents:
        return True
    return None


# The files that take longest with nothing compiled before, roughly in order.
LONGEST = (
    "tests/drafts/test_lossless.py",
    "tests/sharding/test_processes.py",
    "tests/accelerators/test_h200.py",
    "tests/accelerators/test_v5p.py",
    "tests/test_golden.py",
    "tests/train/test_run.py",
    "tests/decode/test_cycle.py",
    "tests/drafts/test_running_batch.py",
    "tests/accelerators/test_slices.py",
    "tests/sharding/test_decode.py",
    "tests/drafts/test_sampled.py",
    "tests/decode/test_sampled_decoding.py",
    "tests/drafts/test_step_by_step.py",
    "tests/train/test_features.py",
    "tests/train/test_step.py",
    "tests/test_serving.py",
    "tests/test_testing.py",
    "tests/test_tune.py",
    "tests/test_64_bit_types.py",
    "tests/test_cli_drafts.py",
    "tests/accelerators/test_training.py",
    "tests/decode/test_insert.py",
    "tests/measure/test_tuning.py",
    "tests/gpu/test_greedy.py",
    "tests/train/test_checkpoint.py",
    "tests/test_ahead_of_time.py",
    "tests/test_cli_batch.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, so that no worker ends with one alone (xdist keeps this order)."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.nodeid.split("::")[0], len(order)))


def pytest_terminal_summary(terminalreporter) -> None:
    """Prints how long .ci/run has taken, installations and earlier environments included."""
    if "GATE_STARTED" in os.environ:
        minutes = (time.time() - int(os.environ["GATE_STARTED"])) / 60
        terminalreporter.write_line(f"since the start of .ci/run: {minutes:.1f} minutes")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs a CUDA device: JAX_PLATFORMS=cuda pytest -m gpu")
