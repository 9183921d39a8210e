"""Writes reference_logits.npz: what transformers makes of the models of reference_cases.py.

    python -m tests.interop.make_reference_logits        needs the extra 'hf'

For each case the prompt and 64 greedy tokens, and the logits at all of them, in float32 on the CPU.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.interop.reference_cases import (
    CASES,
    NUM_GREEDY_TOKENS,
    PROMPT,
    REFERENCE,
    write_model,
)


def reference(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Continues PROMPT with the model of a folder; gives its tokens [T] and logits [T, V]."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    wrong = {name: found for name, found in info.items() if found}
    if wrong:
        raise SystemExit(f"{folder}: transformers loads other tensors: {wrong}")
    prompt = torch.tensor(PROMPT[None])
    with torch.no_grad():
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=NUM_GREEDY_TOKENS,
            max_new_tokens=NUM_GREEDY_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
        )
        logits = model(tokens).logits
    return tokens[0].numpy().astype(np.int32), logits[0].numpy()


def main() -> None:
    """Runs all cases and writes the file."""
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    arrays = {"versions": np.array(versions)}
    for name, config in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            tokens, logits = reference(write_model(Path(folder), config))
        arrays |= {f"{name}/tokens": tokens, f"{name}/logits": logits}
        print(name, float(np.abs(logits).max()), tokens[-8:])
    np.savez_compressed(REFERENCE, **arrays)
    print(REFERENCE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
