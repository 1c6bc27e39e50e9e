"""One contestant of `python -m nanokv.eval against`: runs the checkout in the current folder, on orders line by line.

It knows no more of that checkout than what has stayed the same since its first edition. An order is a JSON line:
{"spec", "context", "steps"} reads a prompt into a new cache, which will take so many steps; {"steps"} alone decodes.
The answer is a JSON list of the seconds that each took, or {"error": ...}.
"""

import inspect
import json
import os
import sys
import time


def main(model: str, threads: str, dtype: str, backend: str) -> None:
    """Load a model and take orders until there are no more."""
    sys.path[0] = os.getcwd()  # in place of this file's folder
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything else prints is no answer
    contestant = None
    for line in sys.stdin:
        try:
            contestant = contestant or Contestant(model, int(threads), dtype, backend)
            answer = contestant.obey(**json.loads(line))
        except Exception as error:  # whatever it is, it is said in one line
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(json.dumps(answer), file=answers, flush=True)


class Contestant:
    """A model, and the cache that it is at."""

    def __init__(self, model: str, threads: int, dtype: str, backend: str):
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        import nanokv
        import weights

        quick = {"fast": backend != "torch"} if "fast" in inspect.signature(weights.load).parameters else {}
        self.model, tokenizer = weights.load(model, dtype=dtype, progress=False, **quick)
        nanokv.kernels.use(backend)
        from pydoc_data.topics import topics

        self.text = torch.tensor([tokenizer.encode("\n\n".join(topics[k] for k in sorted(topics))[:120_000])])
        self.cache = self.run = None

    def obey(self, steps: int, spec: str = "", context: int = 0) -> list[float]:
        """Begin anew with a prompt, or decode; return seconds."""
        if spec:
            return [self.begin(spec, context, steps)]
        return [self.step(i) for i in range(steps)]

    def begin(self, spec: str, context: int, steps: int) -> float:
        import nanokv
        from nanokv.engine import prefill

        self.cache = None  # gives memory back
        start = time.perf_counter()
        self.cache = nanokv.KVCache(self.model, spec.removesuffix(" --compile"))
        prefill(self.model, self.cache, self.text[:, :context])
        seconds = time.perf_counter() - start
        self.run = self.model
        if spec.endswith(" --compile"):
            from nanokv import fast_cpu

            self.run = fast_cpu.compiled(self.model, self.cache, context + steps)
        return seconds

    def step(self, i: int) -> float:
        ids = self.text[:, i : i + 1]
        start = time.perf_counter()
        self.run(ids, self.cache, last=True)
        return time.perf_counter() - start


if __name__ == "__main__":
    main(*sys.argv[1:])
