"""Answer prompts about pictures with vLLM: ``answer.py CHECKPOINT < requests > answers``.

Requests are a JSON list of ``{"prompt": …, "pictures": [file, …]}``; the last line printed is a
JSON list of token id lists.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    from PIL import Image
    from vllm import LLM, SamplingParams

    requests = json.load(sys.stdin)
    model = LLM(
        model=sys.argv[1],
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 2},
    )
    inputs = [
        {
            "prompt": request["prompt"],
            "multi_modal_data": {"image": [Image.open(file) for file in request["pictures"]]},
        }
        for request in requests
    ]
    outputs = model.generate(inputs, SamplingParams(temperature=0, max_tokens=8))
    print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


# vLLM starts its engine in another process, which imports this file again.
if __name__ == "__main__":
    main()
