"""Load a model by name: which source it comes from, its config, an empty model, and the source's tensors in it.

The sources are in nanokv/sources/: the bundled default, the hub, folders in the hub's layout and GGUF files. Modules of
the model are named as a checkpoint names them, so filling it is going through the names. Everything that a user can get
wrong raises LoadError with one line.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from nanokv.model import Config, Decoder
from nanokv.sources import PICKLE_REFUSED, PICKLES, LoadError, Source
from nanokv.sources.bundled import convert, smollm2_folder, smollm2_gguf
from nanokv.sources.folder import ARCHITECTURES, SafetensorsFolder, parse_config
from nanokv.sources.gguf import GGUFFile
from nanokv.sources.hub import hub_folder
from nanokv.tokenizer import Tokenizer

__all__ = ["ARCHITECTURES", "GGUFFile", "LoadError", "SafetensorsFolder", "build", "convert", "load", "open_source"]
__all__ += ["parse_config", "parse_device", "parse_dtype", "smollm2_gguf"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name="smollm2", dtype=torch.float32, device="cpu", revision=None, progress=True, fast=True
) -> tuple[Decoder, Tokenizer]:
    """Load a model by name: "smollm2", a hub id "org/name", a folder in the hub's layout, or a .gguf file.

    dtype and device may be strings ("bf16", "cuda:0"); revision is a hub branch, tag or commit. With `fast` a model on
    a CPU is made quick (nanokv/fast_cpu.py); without, it is the text of nanokv/model.py. The model is in eval mode
    without gradients. Peak memory stays below 1.5 times the model. Raises LoadError.
    """
    dtype, device = parse_dtype(dtype), parse_device(device)
    source = open_source(name, revision, progress)
    try:
        config, tokenizer = parse_config(source.config), source.tokenizer()
    except ValueError as e:
        raise LoadError(f"{source.path}: {e}") from e
    # A chat model's end of turn may stand in the config, the generation config or the tokenizer only.
    tokenizer.eos = tuple(dict.fromkeys(config.eos + tokenizer.eos))
    model = build(replace(config, eos=tokenizer.eos), source, dtype, device)
    if fast and device.type == "cpu":
        from nanokv import fast_cpu

        model = fast_cpu.speed_up(model)
    return model, tokenizer


def open_source(name="smollm2", revision=None, progress=True) -> Source:
    """Find (and where needed download) what `load` would read. Raises LoadError."""
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)) is not None and not str(name).endswith(".gguf")
    try:
        path = Path(name).expanduser()
        is_dir, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, TypeError) as e:  # too long, ~nobody, not a text
        raise LoadError(f"no model {name}: {e}") from e
    if revision is not None and (is_dir or is_file or not hub_id):
        raise LoadError(f"a revision ({revision}) goes with a hub id such as org/name, not with {name}")
    if str(name) == "smollm2":
        return SafetensorsFolder(smollm2_folder(progress))
    if is_dir:
        return SafetensorsFolder(path)
    if is_file and path.suffix in PICKLES:
        raise LoadError(f"{path}: {PICKLE_REFUSED}")
    if is_file and path.suffix == ".safetensors":
        raise LoadError(f"{path} holds weights only; give the folder that also holds config.json and tokenizer.json")
    if is_file:
        return GGUFFile(path)
    if hub_id:
        return SafetensorsFolder(hub_folder(str(name), revision, progress))
    raise LoadError(f"no model {name}: no such file or folder, not smollm2, and not a hub id such as org/name")


def build(config: Config, source: Source, dtype=torch.float32, device="cpu") -> Decoder:
    """Return a Decoder on `device` filled from a source, tensor by tensor, each cast to dtype. Raises LoadError."""
    check_shapes(config, source)
    model = hollow(config)
    wanted = {name: p.shape for name, p in model.named_parameters()}  # a tied head is not among them
    try:
        state = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in wanted.items()}
    except RuntimeError as e:  # the allocator's complaint runs over many lines
        size = sum(shape.numel() for shape in wanted.values()) * dtype.itemsize / 1e9
        raise LoadError(f"{source.path}: {size:.1f} GB of weights do not fit on {device}") from e
    # The largest first, while most of the memory is not touched yet: the file's copy of a tensor adds to the peak.
    for name in sorted(wanted, key=lambda name: -wanted[name].numel()):
        state[name].copy_(source.tensor(checkpoint_name(name)))
    model.load_state_dict(state, strict=not config.tied, assign=True)
    if config.tied:
        model.lm_head.weight = model.embed_tokens.weight
    model.rope.to(device)
    return model.eval().requires_grad_(False)


class _SkipInit(TorchFunctionMode):
    """Leave out random initial values, which a checkpoint replaces: on the meta device they import 150 MB of code."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else None
        return func(*args, **kwargs or {})


def hollow(config: Config) -> Decoder:
    """Return a Decoder whose parameters have shapes but no memory."""
    with torch.device("meta"), _SkipInit():
        return Decoder(config)


def check_shapes(config: Config, source: Source) -> None:
    """Raise LoadError naming the first tensor that a source lacks, has in another shape, or has too many."""
    wanted = set()
    try:
        for name, shape in expected_shapes(config):
            if name not in source.shapes:
                raise LoadError(f"{source.path}: tensor {name} is missing")
            if source.shapes[name] != shape:
                raise LoadError(f"{source.path}: tensor {name} has shape {source.shapes[name]}, not {shape}")
            wanted.add(name)
    except RuntimeError as e:  # such a tensor cannot even be described
        raise LoadError(f"{source.path}: the config has a wrong size: {e}") from e
    ignored = re.compile(r"rotary_emb\.inv_freq$" + (r"|^lm_head\.weight$" if config.tied else ""))
    for name in source.shapes:
        if name not in wanted and not ignored.search(name):
            raise LoadError(f"{source.path}: unexpected tensor {name}")


def expected_shapes(config: Config) -> Iterator[tuple[str, tuple]]:
    """Yield name and shape of every tensor that a checkpoint must have; one layer, without memory, stands for all."""
    one = hollow(replace(config, n_layers=1)).named_parameters()
    shapes = {checkpoint_name(name): tuple(p.shape) for name, p in one}
    layer = {name: shape for name, shape in shapes.items() if name.startswith("model.layers.0.")}
    yield from ((name, shape) for name, shape in shapes.items() if name not in layer)
    for i in range(config.n_layers):
        for name, shape in layer.items():
            yield name.replace(".0.", f".{i}.", 1), shape


def checkpoint_name(name: str) -> str:
    """Return the name that a checkpoint has for a parameter of the Decoder."""
    return name if name.startswith("lm_head.") else "model." + name


def parse_dtype(dtype) -> torch.dtype:
    """Return the dtype meant by "fp32", "float32", "bf16", "fp16", ... or by a torch dtype. Raises LoadError."""
    short = {"fp32": "float32", "f32": "float32", "bf16": "bfloat16", "fp16": "float16", "f16": "float16"}
    word = str(dtype).removeprefix("torch.")
    word = short.get(word, word)
    if word not in DTYPES:
        raise LoadError(f"dtype {dtype} is not supported (supported: {', '.join(DTYPES)})")
    return DTYPES[word]


def parse_device(device) -> torch.device:
    """Return the device meant by "cpu", "cuda", "cuda:1", "mps" or a torch device. Raises LoadError if not there."""
    there = ["cpu"]
    there += ["cuda"] * torch.cuda.is_available() + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there += ["mps"] * torch.backends.mps.is_available()
    if str(device) not in there:
        raise LoadError(f"device {device} is not available (available: {', '.join(there)})")
    return torch.device(device)
