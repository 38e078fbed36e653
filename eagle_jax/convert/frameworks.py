"""The frameworks that EAGLE's model card names, and others: what each reads, and how a head gets there. Data only.

`eagle-jax export --list` prints this table, and docs/export.md shows it.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Framework:
    """Describes a framework for the table.

    name: its own. reads: the heads that it reads. formats: keys of `engines.ENGINES` that bring a head there, the best
    first; empty where none does. direct: whether the format is the framework's own, and not another one's.
    how: what else is needed, or why no head gets there. card: whether EAGLE's model card names it.
    """

    name: str
    reads: str
    formats: tuple[str, ...]
    how: str
    direct: bool = True
    card: bool = True

    @property
    def way(self) -> str:
        """Returns how a head gets there: directly, through another format, or not."""
        if not self.formats:
            return "not"
        return f"{'directly' if self.direct else 'through'}: {', '.join(f'--format {name}' for name in self.formats)}"


FRAMEWORKS: tuple[Framework, ...] = (
    Framework(
        "AMD ROCm",
        "EAGLE-1 and 3 in its builds of vLLM and SGLang; EAGLE-3 in ATOM",
        ("vllm", "sglang"),
        "the builds read the same folders as on other devices; ATOM takes layers.0.* (vllm)",
        direct=False,
    ),
    Framework("AngelSlim", "EAGLE-3", ("angelslim",), "the target's embedding is used; default taps only"),
    Framework(
        "AWS NeuronX Distributed Core",
        "EAGLE-1 with a tree, EAGLE-3 without",
        ("nxd",),
        "set is_eagle_draft (and is_eagle3) in the draft's neuron config; default taps only",
    ),
    Framework(
        "CPM.cu",
        "EAGLE-1, 2 and 3",
        ("cpmcu",),
        "default taps, and the target's RoPE; options use_input_norm, use_attn_norm for EAGLE-1 heads with norms, "
        "frspec_vocab_size for those of frequent tokens",
    ),
    Framework(
        "Intel® Extension for Transformers",
        "EAGLE-1",
        ("official",),
        "it wraps EaModel of the official package, which reads the folder",
        direct=False,
    ),
    Framework(
        "Intel® LLM Library for PyTorch",
        "EAGLE-1 and 2",
        ("official",),
        "ipex-llm optimises EaModel of the official package, which reads the folder",
        direct=False,
    ),
    Framework(
        "MLC-LLM",
        "EAGLE-1, as a chain",
        ("official",),
        "its convert_weight fuses q, k, v and gate, up; it has no EAGLE-3 head",
        direct=False,
    ),
    Framework(
        "NVIDIA NeMo Framework",
        "EAGLE-1, 3 and 3.1, P-EAGLE, DFlash, DSpark",
        ("nemo",),
        "Automodel trains on from it; an EAGLE-1 head needs the two more norms that Automodel's have",
    ),
    Framework(
        "NVIDIA TensorRT-LLM",
        "EAGLE-3 and 3.1 of several layers; EAGLE-1 in its older C++ runtime",
        ("trtllm",),
        "other taps by its option eagle3_layers_to_capture; the C++ runtime builds an engine from --format official",
    ),
    Framework(
        "NVIDIA TensorRT Model Optimizer",
        "EAGLE-1 and 3; it writes DFlash and DSpark",
        ("modelopt",),
        "quantizes an EAGLE head, or trains on from it; a DFlash or DSpark head is written as its own export does",
    ),
    Framework(
        "PaddleNLP",
        "EAGLE-1, in Paddle's own parameter files",
        (),
        "their layout could not be confirmed, and no EAGLE-3 head was found; nothing here writes Paddle files",
    ),
    Framework(
        "SGLang",
        "EAGLE-1, 2, 3 and 3.1, DFlash, DSpark",
        ("sglang",),
        "--speculative-algorithm EAGLE or EAGLE3; DFlash heads by --format official, DSpark heads by specforge",
    ),
    Framework("SpecForge", "EAGLE-3, DFlash, DSpark", ("specforge",), "three taps; its norm_output is not EAGLE-3.1's"),
    Framework(
        "vLLM",
        "EAGLE-1, 3 and 3.1 of several layers, P-EAGLE, DFlash, DSpark",
        ("vllm",),
        "name the method, eagle or eagle3; DFlash and DSpark heads by --format official or speculators",
    ),
    Framework(
        "speculators",
        "EAGLE-3 and 3.1, any number of taps and layers, windows; P-EAGLE, DFlash, DSpark",
        ("speculators",),
        "name the target in speculators_config.verifier; vLLM serves the folder, too",
        card=False,
    ),
    Framework("the official EAGLE code", "EAGLE-1, 2 and 3", ("official",), "default taps only", card=False),
    Framework(
        "OpenVINO GenAI, optimum-intel",
        "EAGLE-3, with a tree",
        ("angelslim", "official"),
        "optimum-intel exports the folder to its own files",
        direct=False,
        card=False,
    ),
    Framework(
        "llama.cpp",
        "EAGLE-3",
        ("official",),
        "its converter to GGUF needs the target's folder, too (--target-model-dir)",
        direct=False,
        card=False,
    ),
    Framework(
        "sglang-jax",
        "EAGLE-3 of one layer, as a chain",
        ("official", "sglang"),
        "it reads midlayer.* in safetensors",
        direct=False,
        card=False,
    ),
    Framework(
        "tpu-inference",
        "EAGLE-3, as a chain",
        ("official", "sglang"),
        "it reads midlayer.*, with default taps",
        direct=False,
        card=False,
    ),
    Framework(
        "DeepSpec",
        "DFlash and DSpark, of Qwen3 layers; EAGLE-3 heads that it trained",
        ("deepspec",),
        "its EAGLE-3 heads come in, and are not written; its DFlash heads draft a token at the root",
        card=False,
    ),
)
COLUMNS = ("framework", "reads", "a head gets there", "note")


def rows() -> list[tuple[str, ...]]:
    """Returns the cells of the table, in the order of COLUMNS."""
    return [(one.name + ("" if one.card else " *"), one.reads, one.way, one.how) for one in FRAMEWORKS]


def markdown() -> str:
    """Returns the table for docs/export.md."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines).replace("--format ", "")
