"""Compiles the variants of our kernels that serving meets, for cards that need not be there: a program that writes JSON.

    python -P tests/support/kernel_variants.py 90 [--every]        (the compute capability, times ten)

Run with the Triton to be tried first on PYTHONPATH (tritons.py does). A variant of attention stands for all numbers
of heads and of rows, which are run-time arguments; `bfloat16` where nothing else is said. The usual variants are each
kernel once, and attention at bfloat16 for every size of head; --every adds soft-caps, windows and float32.
"""

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that one program can have, by capability


class Variant(NamedTuple):
    """A kernel, the types of its arguments that are not float32 pointers or int32, its constants and options."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    usual: bool = True


def attention_variants(capability: int) -> dict[str, Variant]:
    """Contexts and own segments for head sizes 64, 128 and 256, plain and with soft-cap (and window, in contexts)."""
    from guiderail.kernels import _shared_prefix_triton as triton_path

    found = {}
    cases = [("bf16", 2, dim, cap) for dim in (64, 128, 256) for cap in (False, True)] + [("fp32", 4, 128, False)]
    for kind, size, dim, cap in cases:
        tile = triton_path.tile_for(dim, size, SHARED_MEMORY[capability])
        types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{kind}") | {"scale": "fp32", "softcap": "fp32"}
        types |= dict.fromkeys(("slots_ptr", "positions_ptr", "items_ptr"), "*i32")
        for own in (False, True):
            constants = {
                "OWN": own, "WINDOW": cap and not own, "SOFTCAP": cap, "D": dim, "D_P": dim, "LANES": tile.lanes,
                "KEYS": tile.keys, "STAGES": tile.stages, "COLUMNS": triton_path.COLUMNS,
            }  # fmt: skip
            extra = (", soft-cap" if own else ", window and soft-cap") if cap else ""
            name = f"attention to {'own segment' if own else 'contexts'}, heads of {dim}{extra}"
            name += "" if kind == "bf16" else ", float32"
            usual = kind == "bf16" and not cap
            found[name] = Variant(triton_path._level_kernel, types, constants, {"num_warps": tile.warps}, usual)
    return found


def other_variants(capability: int) -> dict[str, Variant]:
    """The other kernels, at the sizes of an 8B model with a vocabulary of 128k."""
    from guiderail.kernels.reward_head import _reward_head_kernel
    from guiderail.kernels.tilt_sample import BLOCK_V, _block_mass_kernel, _draw_kernel
    from guiderail.kernels.token_logprobs import _token_logprobs_kernel, largest_blocks

    tilt = {"token_ptr": "*i64"}
    dense = {"HAS_OTHER": True, "BLOCK_V": BLOCK_V}
    head = {"HAS_NORM": True, "GEMMA": True, "HAS_BIAS": True, "BLOCK_K": 1, "BLOCK_H": 4096}
    blocks = zip(("BLOCK_T", "BLOCK_V", "BLOCK_H"), largest_blocks(2, SHARED_MEMORY[capability]), strict=True)
    logprobs = {"HAS_CAP": True, **dict(blocks)}
    hidden = {"hidden_ptr": "*bf16", "eps": "fp32", "last_ptr": "*i64", "norm_ptr": "*bf16"}
    tokens = {"hidden_ptr": "*bf16", "weight_ptr": "*bf16", "tokens_ptr": "*i64", "softcap": "fp32"}
    return {
        "reward_head": Variant(_reward_head_kernel, hidden, head, {"num_warps": 4}),
        "tilt_sample, block masses": Variant(_block_mass_kernel, tilt, dense, {"num_warps": 8}),
        "tilt_sample, draw": Variant(_draw_kernel, tilt, dense | {"BLOCK_N": 32}, {"num_warps": 8}),
        "token_logprobs": Variant(_token_logprobs_kernel, tokens, logprobs, {"num_warps": 8, "num_stages": 3}),
    }


def variants(capability: int, every: bool) -> dict[str, Variant]:
    """All variants by name, or the usual ones."""
    found = attention_variants(capability) | other_variants(capability)
    return {name: variant for name, variant in found.items() if every or variant.usual}


def compiled(variant: Variant, capability: int) -> dict[str, int]:
    """Registers of a thread, bytes of them that are spilled, and shared memory of a program.

    Matrices are contiguous, and their sizes multiples of 16, which Triton's code depends on.
    Raises what Triton raises where it cannot compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    constants = dict.fromkeys((name for name in names if name.endswith("_col_stride")), 1) | variant.constants
    signature = {n: variant.types.get(n, "*fp32" if n.endswith("_ptr") else "i32") for n in names}
    signature |= dict.fromkeys(constants, "constexpr")
    fixed = {(names.index(name),): value for name, value in constants.items()}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, each in enumerate(variant.kernel.params)
        if each.name.endswith(("_ptr", "_row_stride")) or each.name in ("V", "H")
        if not (each.do_not_specialize or each.do_not_specialize_on_alignment)
    }  # fmt: skip
    source = ASTSource(variant.kernel, signature, fixed, aligned)
    made = triton.compile(source, GPUTarget("cuda", capability, 32), variant.options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    line = next(line for line in said.splitlines() if "REG:" in line)
    use = dict(word.split(":", 1) for word in line.split() if ":" in word)
    return {"registers": int(use["REG"]), "spilled": int(use["STACK"]), "shared": made.metadata.shared}


def main() -> None:
    warnings.simplefilter("ignore")  # Triton announces a default of its next release
    capability, every = int(sys.argv[1]), "--every" in sys.argv
    found: dict[str, Any] = {}
    for name, variant in variants(capability, every).items():
        try:
            found[name] = compiled(variant, capability)
        except Exception as error:  # of many kinds: what is reported is the variant
            found[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
