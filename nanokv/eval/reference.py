"""What other tools measured on the same model, windows and questions, to check this harness against.

Model: smollm2 in fp32 (the Q4_1 file that the default model comes from). Text: pydoc_data.topics of Python 3.11. The
first table is the rise of the NLL, in nats per token: 8 windows of 2,048 tokens, compressed once at their end, and the
256 that follow. The second is the passkey in 2,048 tokens, 12 depths: how many were found, and the NLL per digit.
"""

TOOL = "kvpress 0.5.5 under transformers 5.2, measured on the same windows"
FAKE = "keys per channel and values per token rounded in fp32, group 32, residual 128, measured on the same windows"
TEXT_CHARACTERS = 465_126  # of pydoc_data.topics in Python 3.11, sorted and joined
REMOVED = (0.25, 0.5, 0.75, 0.9)
FULL_PPL = 10.71  # perplexity of the windows' continuations with everything kept
FULL = {("passkey", 2048): (12, 12, 0.07), ("passkey", 1024): (20, 20, None)}  # found, of, NLL per digit

RISE = {  # at REMOVED
    "random": (0.147, 0.366, 0.729, 0.910),
    "streamingllm": (0.021, 0.035, 0.073, 0.138),
    "knorm": (0.067, 0.143, 0.250, 0.350),
    "keydiff": (0.013, 0.054, 0.131, 0.228),
    "tova": (0.011, 0.039, 0.074, 0.135),
    "snapkv": (0.014, 0.036, 0.068, 0.121),
    "pyramidkv": (0.020, 0.064, 0.068, 0.121),
    "adakv": (0.014, 0.030, 0.067, 0.119),
    "expected_attention": (0.005, 0.019, 0.044, 0.111),
}
RISE_ERROR = {  # standard errors over the windows, at 0.5 and 0.9 removed
    "random": (0.037, 0.063),
    "streamingllm": (0.017, 0.031),
    "knorm": (0.036, 0.064),
    "keydiff": (0.008, 0.050),
    "tova": (0.014, 0.033),
    "snapkv": (0.014, 0.027),
    "pyramidkv": (0.019, 0.027),
    "adakv": (0.014, 0.028),
    "expected_attention": (0.011, 0.031),
}
KIVI = {8: (-0.0000, 0.0001), 4: (0.0005, 0.0024), 2: (0.1547, 0.0213)}  # bits: rise, standard error

PASSKEY = {  # found of 12 and NLL per digit, at REMOVED
    "agnostic": {
        "random": ((4, 0.77), (1, 1.90), (0, 3.36), (0, 3.54)),
        "streamingllm": ((9, 0.94), (6, 1.78), (3, 2.64), (1, 3.18)),
        "knorm": ((3, 1.09), (0, 2.53), (0, 3.11), (0, 3.15)),
        "keydiff": ((11, 0.20), (7, 0.80), (3, 1.44), (0, 2.20)),
        "tova": ((6, 0.91), (4, 1.62), (0, 2.98), (0, 3.31)),
        "snapkv": ((4, 1.07), (0, 2.11), (0, 3.16), (0, 3.32)),
        "pyramidkv": ((5, 1.25), (0, 2.68), (0, 3.16), (0, 3.32)),
        "adakv": ((6, 1.09), (0, 2.29), (0, 3.14), (0, 3.35)),
        "expected_attention": ((3, 1.67), (1, 2.67), (0, 3.16), (0, 3.33)),
    },
    "aware": {
        "random": ((8, 0.54), (0, 1.89), (0, 3.71), (0, 3.93)),
        "streamingllm": ((9, 0.86), (6, 1.60), (3, 2.30), (1, 2.80)),
        "knorm": ((2, 1.05), (0, 2.49), (0, 3.34), (0, 3.51)),
        "keydiff": ((12, 0.13), (9, 0.37), (8, 0.82), (2, 1.91)),
        "tova": ((11, 0.15), (9, 0.38), (6, 0.99), (1, 1.65)),
        "snapkv": ((11, 0.24), (5, 0.74), (0, 1.26), (0, 1.87)),
        "pyramidkv": ((11, 0.16), (4, 0.80), (0, 1.26), (0, 1.87)),
        "adakv": ((10, 0.31), (3, 0.91), (0, 1.36), (0, 1.86)),
        "expected_attention": ((4, 1.29), (1, 2.24), (0, 2.82), (0, 3.06)),
    },
}
KIVI_PASSKEY = {8: (12, 0.07), 4: (12, 0.08), 2: (5, 0.78)}  # bits: found of 12, NLL per digit; agnostic
