"""The logits of an exported folder in transformers: for each line of token ids on stdin `[tokens, vocab]` f32 on stdout. Exit
status 3 if a package is missing."""

import sys

try:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
except ImportError as error:
    print(error, file=sys.stderr)
    sys.exit(3)
for line in sys.stdin:
    ids = torch.tensor([[int(word) for word in line.split()]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0]
    sys.stdout.buffer.write(logits.float().cpu().contiguous().numpy().tobytes())
