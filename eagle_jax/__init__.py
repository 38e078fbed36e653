"""EAGLE speculative decoding in JAX: the same text as the target model, in fewer passes."""

from eagle_jax import sampling
from eagle_jax.api import Chunk, Output, advance, draft_forward, forward, generate, propose, stream
from eagle_jax.convert import CheckpointError, from_pretrained, load, load_draft, tokenizer
from eagle_jax.decode.cycle import cycle
from eagle_jax.decode.insert import insert
from eagle_jax.decode.prefill import BUCKETS, pad, prefill
from eagle_jax.decode.state import DecodeState, empty_state
from eagle_jax.detokenizer import Detokenizer
from eagle_jax.drafts.dflash import DFlash, DFlashConfig
from eagle_jax.drafts.draft_model import DraftModel
from eagle_jax.drafts.dspark import DSpark, DSparkConfig, with_confidence
from eagle_jax.drafts.eagle.config import DraftConfig
from eagle_jax.drafts.eagle.drafting import with_window
from eagle_jax.drafts.eagle.eagle1 import Eagle1Draft
from eagle_jax.drafts.eagle.eagle3 import Eagle3Draft
from eagle_jax.drafts.eagle.p_eagle import PEagle, PEagleConfig
from eagle_jax.drafts.lookahead import Lookahead
from eagle_jax.drafts.lookup_first import LookupFirst
from eagle_jax.drafts.medusa import Medusa, MedusaConfig
from eagle_jax.drafts.prompt_lookup import PromptLookup
from eagle_jax.drafts.protocol import Committed, Context, Draft, Proposal, Text
from eagle_jax.models.config import ConfigError, LlamaConfig
from eagle_jax.models.llama import Llama
from eagle_jax.models.params import input_first
from eagle_jax.models.target import Target, TargetOutput
from eagle_jax.sampling import SamplingConfig
from eagle_jax.tree import PUBLISHED_TREES, BestExpansions, BestPrefixes, StaticTree, Tree, TreeConfig, TreePolicy
from eagle_jax.version import __version__

__all__ = [
    "BUCKETS",
    "PUBLISHED_TREES",
    "BestExpansions",
    "BestPrefixes",
    "CheckpointError",
    "Chunk",
    "Committed",
    "ConfigError",
    "Context",
    "DFlash",
    "DFlashConfig",
    "DSpark",
    "DSparkConfig",
    "DecodeState",
    "Detokenizer",
    "Draft",
    "DraftConfig",
    "DraftModel",
    "Eagle1Draft",
    "Eagle3Draft",
    "Llama",
    "LlamaConfig",
    "Lookahead",
    "LookupFirst",
    "Medusa",
    "MedusaConfig",
    "Output",
    "PEagle",
    "PEagleConfig",
    "PromptLookup",
    "Proposal",
    "SamplingConfig",
    "StaticTree",
    "Target",
    "TargetOutput",
    "Text",
    "Tree",
    "TreeConfig",
    "TreePolicy",
    "__version__",
    "advance",
    "cycle",
    "draft_forward",
    "empty_state",
    "forward",
    "from_pretrained",
    "generate",
    "input_first",
    "insert",
    "load",
    "load_draft",
    "pad",
    "prefill",
    "propose",
    "sampling",
    "stream",
    "tokenizer",
    "with_confidence",
    "with_window",
]
