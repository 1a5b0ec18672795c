"""Kernels: operations with a Triton path for GPUs and a torch path of the same meaning. They know no model, no server.

A file is one operation and reads alike: formula and source in its first lines, the Triton kernel, its launch, the torch
path, and last the public function, which says shapes, dtypes and errors, checks them and takes one of the two paths.

Imported as `guiderail.kernels` only: a bare top-level `kernels` on sys.path would be taken by
transformers for the Hub's package of that name (tests/test_layout.py).
"""

from guiderail.kernels.reward_head import reward_head
from guiderail.kernels.shared_prefix_attention import shared_prefix_attention
from guiderail.kernels.tilt_sample import tilt_sample
from guiderail.kernels.token_logprobs import token_logprobs

__all__ = ["reward_head", "shared_prefix_attention", "tilt_sample", "token_logprobs"]
