"""What the checks of exports in other engines share. Needs numpy.

Each greedy token of an engine must be the one that we choose behind the same tokens, but for near ties: logits no further apart
than NEAR may change places by what engines round on the way (activations to 8 bits, weights to fp16, sums in another order).
"""

import json
import os
import subprocess
import tempfile

import numpy as np

# The furthest seen: 0.43 in llama.cpp, which rounds activations to 8 bits, 0.05 in ONNX Runtime, 0
# in transformers.
NEAR = 0.5


def logits_here(slimllm, model, tokens):
    """The logits of each position, [tokens, vocab], by `slimllm logits`."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "logits.safetensors")
        ids = ",".join(map(str, tokens))
        subprocess.run([slimllm, "logits", model, "--tokens", ids, "-o", out, "--device", "cpu"], check=True)
        with open(out, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            return np.fromfile(file, np.float32).reshape(header["logits"]["shape"])


def negative_log_likelihood(logits, tokens):
    """The mean over tokens 2 .. of a window."""
    logits = logits[:-1].astype(np.float64)
    highest = logits.max(axis=1)
    log_sum = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    return np.mean(log_sum - logits[np.arange(len(logits)), tokens[1:]])


def gap(logits):
    """How far the best two of logits [vocab] are apart."""
    second, best = np.partition(logits, -2)[-2:]
    return best - second


def same_tokens(logits, tokens):
    """Whether an engine's greedy `tokens` are ours but for near ties, and how to say that. `logits`: ours where the engine chose
    each of them, [tokens, vocab] or more."""
    below = [row.max() - row[token] for row, token in zip(logits, tokens)]
    ties = [margin for margin in below if margin > 0]
    what = f"{len(tokens)} tokens, {len(tokens) - len(ties)} of them ours"
    if ties:
        what += f", the others' logits at most {max(ties):.3f} below"
    return max(below, default=0) <= NEAR, what
