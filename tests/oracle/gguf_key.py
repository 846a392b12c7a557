"""Copies a GGUF file with one more key, of type f32.

    pip install gguf==0.19.0
    python tests/oracle/gguf_key.py IN OUT KEY VALUE
"""

import struct
import sys

import gguf


def main(source, target, key, value):
    reader = gguf.GGUFReader(source)
    with open(source, "rb") as file:
        data = file.read()
    last = max(reader.fields.values(), key=lambda field: field.offset)
    keys_end = last.offset + sum(part.nbytes for part in last.parts)
    infos_end = max(
        tensor.field.offset + sum(part.nbytes for part in tensor.field.parts) for tensor in reader.tensors
    )
    # Behind the magic number, the version and the number of tensors.
    (count,) = struct.unpack_from("<Q", data, 16)
    entry = struct.pack("<Q", len(key)) + key.encode()
    entry += struct.pack("<If", gguf.GGUFValueType.FLOAT32, float(value))
    header = data[:16] + struct.pack("<Q", count + 1) + data[24:keys_end] + entry + data[keys_end:infos_end]
    padding = bytes(-len(header) % reader.alignment)
    with open(target, "wb") as file:
        file.write(header + padding + data[reader.data_offset :])


main(*sys.argv[1:])
