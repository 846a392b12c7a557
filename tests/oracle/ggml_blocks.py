"""Writes tests/data/ggml/blocks.safetensors: blocks of random bytes of each ggml type, and their values.

    pip install gguf==0.19.0 numpy==2.4.6 safetensors==0.8.0
    python tests/oracle/ggml_blocks.py tests/data/ggml/blocks.safetensors

Tensors `TYPE.blocks` (u8) and `TYPE.values` (f32), TYPE as the package `gguf` names it.
"""

import sys

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from safetensors.numpy import save_file

SEED = 20240514
BLOCKS = 2  # blocks of 32 or 256 values
PLAIN_VALUES = 16

# Where a block's fp16 fields lie: random bytes there could be infinite or no number.
HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "MXFP4": [],
}


def random_blocks(rng, name):
    """Random bytes with random fp16 fields."""
    _, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    blocks = rng.integers(0, 256, (BLOCKS, block_bytes), dtype=np.uint8)
    for at in HALVES[name]:
        halves = rng.normal(0, 0.1, (BLOCKS, 1)).astype("<f2")
        blocks[:, at : at + 2] = halves.view(np.uint8)
    return blocks


def main(path):
    rng = np.random.default_rng(SEED)
    plain = rng.normal(0, 1, (1, PLAIN_VALUES)).astype("<f4")
    tensors = {}
    for name in ["F32", "F16", "BF16", *HALVES]:
        dtype = GGMLQuantizationType[name]
        blocks = random_blocks(rng, name) if name in HALVES else gguf.quants.quantize(plain, dtype)
        tensors[f"{name}.blocks"] = np.ascontiguousarray(blocks).view(np.uint8).reshape(-1)
        tensors[f"{name}.values"] = gguf.quants.dequantize(blocks, dtype).reshape(-1)
    save_file(tensors, path)


main(sys.argv[1])
