"""Checks that the Python package `gguf` finds in a SliM file what `slimllm inspect --json --metadata` says.

    python tests/peers/read_with_gguf.py FILE JSON
"""

import json
import sys

import numpy as np
from gguf import GGUFReader


def same_value(a, b):
    """Equality, where real numbers need to agree as f32 only: GGUF stores most of them so."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_value, a, b))
    if isinstance(a, float) and isinstance(b, (int, float)):
        return np.float32(a) == np.float32(b)
    return type(a) is type(b) and a == b


def describe(tensor):
    """A tensor as `inspect` describes it: outermost dimension first."""
    return {
        "name": tensor.name,
        "type": tensor.tensor_type.name,
        "shape": [int(size) for size in reversed(tensor.shape)],
        "bytes": int(tensor.n_bytes),
    }


def differences(reader, inspected):
    """One sentence for each thing that differs."""
    # The package lists header fields as `GGUF.*` among the metadata.
    found = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    expected = inspected["metadata"]
    for key in sorted(found.keys() | expected.keys()):
        if key not in found or key not in expected:
            yield f"metadata key `{key}` is missing in {'the file' if key in expected else 'the JSON'}"
        elif not same_value(found[key], expected[key]):
            yield f"metadata key `{key}` differs: found {found[key]!r}, expected {expected[key]!r}"

    if len(reader.tensors) != len(inspected["tensors"]):
        yield f"number of tensors differs: found {len(reader.tensors)}, expected {len(inspected['tensors'])}"
    for tensor, expected in zip(reader.tensors, inspected["tensors"]):
        found = describe(tensor)
        expected = {key: expected[key] for key in found}
        if found != expected:
            yield f"tensor differs: found {found}, expected {expected}"


def main(file, inspected):
    with open(inspected, encoding="utf-8") as text:
        found = list(differences(GGUFReader(file), json.load(text)))
    if found:
        sys.exit("\n".join(f"error: {sentence}" for sentence in found))


main(*sys.argv[1:])
