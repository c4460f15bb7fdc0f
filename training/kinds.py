"""What is trained: one table of shapes and budgets. A kind is a pair of target and drafter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from training.data import MAX_LENGTH
from training.gemma import FULL, SLIDING
from training.tokenizer import BOS, PAD, STOP, VOCAB

Settings = dict[str, Any]
COMMON: Settings = {
    "vocab_size": VOCAB, "num_attention_heads": 4, "head_dim": 64, "global_head_dim": 128, "sliding_window": 128,
    "max_position_embeddings": MAX_LENGTH, "tie_word_embeddings": True, "use_bidirectional_attention": None,
    "pad_token_id": PAD, "eos_token_id": list(STOP), "bos_token_id": BOS,
}  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """Part of a run: batches of rows x length tokens, every `rare`-th of them one long window instead (0: none)."""

    share: float  # of the steps
    rows: int
    length: int
    rare: int = 0
    rare_length: int = 0


@dataclass(frozen=True)
class Kind:
    target: Settings  # of Gemma4TextConfig, over COMMON
    drafter: Settings  # its own sizes; heads and rope come from the target
    centroids: int = 0  # clusters of the drafter's head; 0: a plain head
    top_clusters: int = 0
    target_steps: int = 2400
    drafter_steps: int = 1200
    replies: int = 400_000  # tokens of the target's own replies
    phases: tuple[Phase, ...] = (Phase(0.75, 6, 512), Phase(0.25, 3, 1024, rare=12, rare_length=6144))
    drafter_rows: int = 3
    modules: int | None = None  # modules of the library to use; None: all


# The graph of the 26B-A4B: router, experts beside a dense branch, keys that are values, no per-layer inputs.
MOE = Kind(
    target=COMMON | {
        "hidden_size": 192, "intermediate_size": 192, "layer_types": [SLIDING, SLIDING, FULL] * 2,
        "num_key_value_heads": 2, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
        "enable_moe_block": True, "num_experts": 24, "top_k_experts": 4, "moe_intermediate_size": 64,
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCAB,
        "final_logit_softcapping": 30.0, "use_double_wide_mlp": False,
    },
    drafter={"hidden_size": 128, "intermediate_size": 640, "layer_types": [SLIDING] * 3 + [FULL]},
)  # fmt: skip

# The graph of the E2B: per-layer inputs, layers that borrow their K/V with a doubled MLP, a centroid head.
E2B = Kind(
    target=COMMON | {
        "hidden_size": 128, "intermediate_size": 256, "layer_types": [SLIDING, SLIDING, FULL] * 3,
        "num_key_value_heads": 1, "num_global_key_value_heads": None, "attention_k_eq_v": False,
        "enable_moe_block": False, "num_kv_shared_layers": 3, "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB, "final_logit_softcapping": 30.0, "use_double_wide_mlp": True,
    },
    drafter={"hidden_size": 64, "intermediate_size": 128, "layer_types": [SLIDING] * 3 + [FULL]},
    centroids=128, top_clusters=16, target_steps=600, drafter_steps=300, replies=100_000,
)  # fmt: skip

# Every part of MOE, as small as it trains: for tests.
TINY = Kind(
    target=MOE.target | {
        "vocab_size": 1024, "vocab_size_per_layer_input": 1024, "hidden_size": 64, "intermediate_size": 64,
        "layer_types": [SLIDING, FULL], "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
        "global_head_dim": 64, "sliding_window": 32, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64,
    },
    drafter={"hidden_size": 64, "intermediate_size": 64, "layer_types": [SLIDING, FULL]},
    target_steps=80, drafter_steps=40, replies=10_000, modules=24, drafter_rows=2,
    phases=(Phase(0.75, 8, 128), Phase(0.25, 4, 256, rare=8, rare_length=1024)),
)  # fmt: skip

KINDS = {"moe": MOE, "e2b": E2B}
