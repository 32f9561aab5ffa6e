"""vLLM behind standard input and output, for an interpreter of its own: python vllm_peer.py, one JSON object a line.

{"load": {arguments of vllm.LLM}} is answered by {"ready": version}, then each {"prompts": [[id, …], …],
"max_new_tokens": n} by {"ids": [[id, …], …], "seconds": of the generation alone}. Nothing of this project is imported.
"""

import json
import os
import sys
import time


def main() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM and its kernels print goes to standard error
    import vllm

    engine = None
    for line in sys.stdin:
        asked = json.loads(line)
        if "load" in asked:
            engine = vllm.LLM(**asked["load"])
            answer = {"ready": vllm.__version__}
        else:
            # No text: the peers that are compared by ids need not pay for it.
            params = vllm.SamplingParams(temperature=0, max_tokens=asked["max_new_tokens"], detokenize=False)
            prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
            started = time.perf_counter()
            outputs = engine.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - started
            answer = {"ids": [list(output.outputs[0].token_ids) for output in outputs], "seconds": seconds}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
