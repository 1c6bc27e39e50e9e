"""Generate text with a compressed KV cache. Read this file first; all flags live in nanokv/cli.py.

python generate.py --method kivi --bits 2
python generate.py --method streamingllm+kivi --ratio 0.3 --prompt-file essay.txt
"""

import sys


def lesson(prompt: str = "Why is the sky blue?", spec: str = "kivi(bits=4, residual=32)", n: int = 128) -> dict:
    """Do what the command line does, without its flags: print the text that follows, return the bytes it took.

    python -c "import generate; generate.lesson()"
    """
    from nanokv import KVCache, generate
    from nanokv.engine import text
    from weights import load

    model, tokenizer = load("smollm2")  # a decoder (nanokv/model.py), and what turns text into token ids
    cache = KVCache(model, spec)  # what the decoder remembers, an object of its own (nanokv/cache.py)
    ids = tokenizer.encode(tokenizer.chat([{"role": "user", "content": prompt}]))
    tokens = generate(model, cache, ids, max_new_tokens=n, stop=tokenizer.eos)  # one at a time (nanokv/engine.py)
    for piece in text(tokens, tokenizer):
        print(piece, end="", flush=True)
    ledger = cache.ledger()["total"]  # every tensor that the cache holds, by what it is for
    print(f"\n{ledger['held']:,} bytes held, where a full cache has {ledger['full']:,}")
    return ledger


def main(argv=None) -> int:
    """Run the command line and return its exit code."""
    try:
        from nanokv import cli  # importing torch takes a second or two
    except KeyboardInterrupt:
        return 130
    return cli.main(argv)


if __name__ == "__main__":
    sys.exit(main())
