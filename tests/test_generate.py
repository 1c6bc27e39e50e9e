"""The command line: every flag and every refusal, in-process on a tiny random model, and signals and pipes for real."""

import io
import json
import os
import re
import signal
import string
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny
import tokenizers
import torch
from safetensors.torch import save_file

import generate
import weights
from nanokv import KVCache, engine, fast_cpu, kernels, show
from nanokv import cli as command
from nanokv.chat import Conversation
from nanokv.methods import available, find, parse

ROOT = Path(__file__).parent.parent
CONTEXT = 96
CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
EVERY = [info.name for info in available()]


def write_model(folder, template=CHAT, eos=None):
    """Write a tiny random model with one token per byte, for 101 of them; return the decoder."""
    model = tiny.model(context=CONTEXT)
    c, folder = model.config, Path(folder)
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": c.hidden, "intermediate_size": c.ffn}
    config |= {"num_attention_heads": c.n_heads, "num_key_value_heads": c.n_kv_heads, "head_dim": c.head_dim}
    config |= {"num_hidden_layers": c.n_layers, "vocab_size": c.vocab, "max_position_embeddings": c.context}
    config |= {"rms_norm_eps": c.eps, "rope_theta": c.rope_theta, "eos_token_id": eos}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {weights.checkpoint_name(name): t.contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    bytewise = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    symbols = dict.fromkeys(bytewise.pre_tokenize_str(string.printable[:95] + "\n\tüß€")[0][0])
    raw = tokenizers.Tokenizer(tokenizers.models.BPE({s: i for i, s in enumerate(symbols)}, []))
    raw.pre_tokenizer = bytewise
    raw.decoder = tokenizers.decoders.ByteLevel()
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_model(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return weights.load(folder, progress=False)


@pytest.fixture
def cli(folder, capfd, monkeypatch):
    """Run the command line on the tiny model: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "stdin", None)

    def run(*argv, model=folder, prompt="the quick brown fox"):
        said = () if prompt is None else ("--prompt", prompt)
        code = generate.main(["--model", str(model), *said, "--max-new-tokens", "12", *map(str, argv)])
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def refused(cli, monkeypatch):
    """Check that a command line is refused in one line that holds all of `words`; by default before any model loads."""

    def run(*argv, words, loads=False, **options):
        with monkeypatch.context() as patch:
            if not loads:
                patch.setattr(weights, "load", lambda *a, **k: pytest.fail("the model was loaded"))
            code, out, err = cli(*argv, **options)
        assert (code, out) == (2, "") and re.fullmatch(r"generate\.py: error: [^\n]+\n", err), err
        for word in [words] if isinstance(words, str) else words:
            assert word in err, err

    return run


def rows(err) -> dict:
    """Read the closing table."""
    cells = [[c.strip() for c in line.split("│")[1:3]] for line in err.splitlines() if line.startswith("│")]
    out, last = {}, None
    for name, value in cells:  # a long value runs over several lines
        last = name or last
        out[last] = out.get(last, "") + value
    return out


def expected(loaded, prompt, spec="full", raw=False, n=12, **options):
    """Return the text that nanokv makes without the command line, and the cache it leaves."""
    model, tokenizer = loaded
    cache = KVCache(model, spec)
    text = prompt if raw else f"[user]{prompt}[assistant]"
    ids = engine.generate(model, cache, tokenizer.encode(text), n, **options)
    return "".join(engine.text(ids, tokenizer)), cache


# ---------------------------------------------------------------------------------------------------------- the text


def test_the_lesson_makes_the_same_text(loaded, monkeypatch, capfd):
    monkeypatch.setattr(weights, "load", lambda name: loaded)
    text, cache = expected(loaded, "the quick brown fox", "kivi(residual=32)")
    ledger = generate.lesson("the quick brown fox", "kivi(residual=32)", 12)
    assert ledger == cache.ledger()["total"]
    said = f"{text}\n{cache.nbytes:,} bytes held, where a full cache has {ledger['full']:,}\n"
    assert capfd.readouterr().out == said


def test_stdout_is_the_text_and_nothing_else(cli, loaded):
    text, cache = expected(loaded, "the quick brown fox")
    code, out, err = cli()
    assert code == 0 and out == text and len(text) > 0
    table = rows(err)
    assert table["method"] == "full" and table["prompt tokens"] == str(len("[user]the quick brown fox[assistant]"))
    assert table["new tokens"] == "12, greedy, ended by --max-new-tokens"
    assert table["cache held"] == show.size(cache.nbytes)
    assert table["full cache"] == show.size(cache.ledger()["total"]["full"])
    assert table["dtype, device"].startswith("float32, cpu, ")
    for name, unit in (("time to first token", " s"), ("decode", " tokens/s"), ("peak memory", "iB (process)")):
        number, rest = re.match(r"([\d.]+)(.*)", table[name]).groups()
        assert float(number) >= 0 and rest.endswith(unit), table[name]


def test_pieces_are_flushed_as_they_are_made(folder, monkeypatch):
    class Out(io.StringIO):
        pieces, pending = [], ""

        def write(self, text):
            self.pending += text

        def flush(self):
            if self.pending:
                self.pieces.append(self.pending)
            self.pending = ""

    monkeypatch.setattr(sys, "stdout", Out())
    assert generate.main(["--model", str(folder), "--prompt", "abc", "--max-new-tokens", "30"]) == 0
    assert len(Out.pieces) > 10


def test_system_message(cli, loaded):
    text, _ = expected(loaded, "[system]be brief[user]hello[assistant]", raw=True)
    assert cli("--system", "be brief", prompt="hello")[1] == text != cli(prompt="hello")[1]


def test_raw_leaves_the_template_out(cli, loaded):
    text, _ = expected(loaded, "hello", raw=True)
    code, out, err = cli("--raw", prompt="hello")
    assert out == text and rows(err)["prompt tokens"] == "5"


def test_model_without_template_is_noted_once(cli, loaded, refused, tmp_path):
    write_model(tmp_path, template=None)
    code, out, err = cli(model=tmp_path, prompt="hello")
    assert code == 0 and out == expected(loaded, "hello", raw=True)[0]
    assert err.count("no chat template") == 1 and "no chat template" not in cli("--raw", model=tmp_path)[2]
    refused("--system", "x", words=["chat template", "--system"], model=tmp_path, loads=True)


def test_failing_template_is_an_error(refused, tmp_path):
    write_model(tmp_path, template="{{ raise_exception('no such\n role') }}")
    refused(words=["chat template failed", "no such role"], model=tmp_path, loads=True)


# -------------------------------------------------------------------------------------------------- sampling and ends


def test_same_seed_same_text(cli):
    def texts(*seeds):
        return [cli("--temperature", "1.5", "--seed", s)[1] for s in seeds]

    a, b, c = texts(1, 1, 2)
    assert a == b != c


def test_seed_is_reported_and_repeats_the_text(cli):
    code, out, err = cli("--temperature", "2")
    seed = re.search(r"temperature 2, seed (\d+)", rows(err)["new tokens"])[1]
    assert cli("--temperature", "2", "--seed", seed)[1] == out
    assert cli("--temperature", "2")[1] != out


@pytest.mark.parametrize(
    "flags, options",
    [
        (["--temperature", "1.5", "--seed", "3", "--top-k", "3"], {"temperature": 1.5, "seed": 3, "top_k": 3}),
        (["--temperature", "1.5", "--seed", "3", "--top_p", "0.5"], {"temperature": 1.5, "seed": 3, "top_p": 0.5}),
        (["--temperature", "1.5", "--seed", "3", "--min-p", "0.4"], {"temperature": 1.5, "seed": 3, "min_p": 0.4}),
        (["--repetition-penalty", "5"], {"repetition_penalty": 5.0}),
    ],
)
def test_sampling_flags_reach_the_engine(cli, loaded, flags, options):
    plain = {k: v for k, v in options.items() if k in ("temperature", "seed")}
    text, _ = expected(loaded, "the quick brown fox", **options)
    assert cli(*flags)[1] == text != expected(loaded, "the quick brown fox", **plain)[0]


def test_filters_without_temperature_are_noted(cli):
    assert "do nothing at temperature 0" in cli("--top-k", "5")[2]
    assert "do nothing" not in cli("--top-k", "5", "--temperature", "1")[2] + cli()[2]


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_new_tokens(cli, loaded, n):
    code, out, err = cli("--max-new-tokens", n)
    assert code == 0 and out == expected(loaded, "the quick brown fox", n=n)[0]
    table = rows(err)
    assert table["new tokens"].startswith(f"{n}, ") and table["new tokens"].endswith("--max-new-tokens")
    assert (table["time to first token"] == "-") == (n == 0) and (table["decode"] == "-") == (n < 2)


def test_stop_strings(cli, loaded):
    text, _ = expected(loaded, "the quick brown fox", n=30)
    assert len(text) > 12
    first, second = text[9:11], text[4:6]
    cut = min(text.find(first), text.find(second))
    code, out, err = cli("--stop", first, "--stop", second, "--max-new-tokens", "30")
    assert out == text[:cut] and rows(err)["new tokens"].endswith("ended by a stop string")


def test_end_of_text_and_ignore_eos(cli, loaded, tmp_path):
    model, tokenizer = loaded
    ids = list(engine.generate(model, KVCache(model), tokenizer.encode("[user]abc[assistant]"), 12))
    eos = ids[5]
    write_model(tmp_path, eos=eos)
    code, out, err = cli(model=tmp_path, prompt="abc")
    assert out == "".join(engine.text(ids[: ids.index(eos)], tokenizer))
    assert rows(err)["new tokens"] == f"{ids.index(eos)}, greedy, ended by the end of the text"
    code, out, err = cli("--ignore-eos", model=tmp_path, prompt="abc")
    assert out == "".join(engine.text(ids, tokenizer)) and "--max-new-tokens" in rows(err)["new tokens"]


def test_end_of_text_at_the_last_position_is_not_a_full_context(cli, loaded, tmp_path):
    model, tokenizer = loaded
    for letter in string.ascii_letters:  # find a text whose last token, from the context's last position, is new
        prompt = letter * (CONTEXT - 8)
        ids = list(engine.generate(model, KVCache(model), tokenizer.encode(prompt), 20))
        if ids.index(ids[-1]) == len(ids) - 1:
            break
    assert len(ids) == 9 and ids.index(ids[-1]) == 8
    write_model(tmp_path, eos=ids[-1])
    code, out, err = cli("--raw", "--max-new-tokens", 20, model=tmp_path, prompt=prompt)
    assert rows(err)["new tokens"] == "8, greedy, ended by the end of the text" and "context" not in err


def test_full_context_is_noted(cli):
    code, out, err = cli("--raw", "--max-new-tokens", 50, prompt="a" * (CONTEXT - 5))
    assert code == 0 and rows(err)["new tokens"] == "6, greedy, ended by a full context"
    assert len(re.findall(rf"generate\.py: the text ended because the model's context of {CONTEXT} tokens", err)) == 1
    code, out, err = cli("--raw", "--max-new-tokens", 50, "--method", "streamingllm(budget=32)", prompt="a" * 91)
    assert rows(err)["new tokens"].startswith("50, ") and "full" not in rows(err)["new tokens"]


def test_prompt_beyond_the_context(cli, refused):
    code, out, err = cli("--raw", "--method", "streamingllm", "--budget", 32, prompt="a" * 200)
    assert code == 0 and rows(err)["prompt tokens"] == "200"
    refused("--raw", words=["97 tokens", f"context {CONTEXT}"], prompt="a" * 97, loads=True)


# --------------------------------------------------------------------------------------------- where prompts come from


def piped(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_prompt_file(cli, tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffgrüße\r\n\r\nSie\n".encode())
    assert cli("--prompt-file", file, prompt=None)[1] == cli(prompt="grüße\n\nSie")[1]
    file.write_text("\n one newline of two\n\n")
    assert command.plan(command.parse(["--prompt-file", str(file)])).prompt == "\n one newline of two\n"


def test_standard_input(cli, monkeypatch):
    wanted, other = cli(prompt="hello")[1], cli(prompt="other")[1]
    assert wanted != other
    piped(monkeypatch, b"hello\n")
    assert cli(prompt=None)[1] == wanted
    piped(monkeypatch, b"hello\n")
    assert cli("--prompt-file", "-", prompt=None)[1] == wanted
    piped(monkeypatch, b"hello\n")
    assert cli(prompt="other")[1] == other


def test_built_in_prompt_where_nothing_is_piped(monkeypatch):
    def prompt(*argv):
        return command.plan(command.parse(list(argv))).prompt

    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    for stdin in (None, io.TextIOWrapper(io.BytesIO(b"")), Terminal(io.BytesIO(b"typed")), open(os.devnull)):  # noqa: SIM115
        monkeypatch.setattr(sys, "stdin", stdin)
        assert prompt() == command.PROMPT
    sys.stdin.close()
    assert prompt() == command.PROMPT
    assert prompt("--prompt", "mine") == "mine"


def test_built_in_prompt_is_longer_than_what_kivi_keeps_exact(smollm2):
    _, tokenizer = smollm2
    said = tokenizer.chat([{"role": "user", "content": command.PROMPT}])
    assert 200 <= len(tokenizer.encode(said)) <= 600


def test_empty_prompts(refused, monkeypatch, tmp_path):
    (tmp_path / "empty").write_text(" \n")
    for prompt in ("", "  \n\t"):
        refused(words="the prompt is empty", prompt=prompt)
    refused("--prompt-file", tmp_path / "empty", words="the prompt is empty", prompt=None)
    piped(monkeypatch, b"\n")
    refused(words="the prompt is empty", prompt=None)


def test_unreadable_prompt_files(refused, monkeypatch, tmp_path):
    (tmp_path / "latin").write_bytes("grüße".encode("latin-1"))
    refused("--prompt-file", tmp_path / "none", words=["none", "No such file"], prompt=None)
    refused("--prompt-file", tmp_path, words="Is a directory", prompt=None)
    refused("--prompt-file", "a\0b", words="null", prompt=None)
    refused("--prompt-file", "-", words="cannot read the prompt from -", prompt=None)
    refused("--prompt-file", tmp_path / "latin", words=["latin", "not UTF-8 at byte 2"], prompt=None)
    piped(monkeypatch, b"\xff\xfe")
    refused(words="standard input is not UTF-8", prompt=None)
    monkeypatch.setattr(command, "MAX_PROMPT", 1 << 20)
    (tmp_path / "long").write_text("a" * ((1 << 20) + 1))
    refused("--prompt-file", tmp_path / "long", words="longer than 1 MiB", prompt=None)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_forbidden_prompt_file(refused, tmp_path):
    (tmp_path / "secret").write_text("x")
    (tmp_path / "secret").chmod(0)
    refused("--prompt-file", tmp_path / "secret", words="Permission denied", prompt=None)


def test_text_that_is_no_utf8(refused):
    refused(words="not valid UTF-8", prompt="a\udcff")
    refused("--system", "\udcff", words="not valid UTF-8")
    refused("--stop", "\udcff", words="not valid UTF-8")


# --------------------------------------------------------------------------------------------- methods and their flags


@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_of_every_method_is_a_flag(name):
    """Give each parameter its own default through its flag, with dashes and with underscores."""
    info = find(name)
    for parameter, default in info.parameters.items():
        value = {"budget": 64}.get(parameter, 1) if isinstance(default, type) else default
        if default is None or (name, parameter) == ("random", "seed"):  # --seed is the sampler's: write it in --method
            continue
        for word in (parameter, parameter.replace("_", "-")):
            switch = f"--{word}" if value else f"--no-{word}"
            args = command.parse(["--method", name, switch if isinstance(value, bool) else f"--{word}={value}"])
            assert command.choose(name, args.parameters)[0][1] == {parameter: value}


def test_flags_change_the_method(cli, loaded):
    spec = "streamingllm(budget=16, n_sink=2)+kivi(bits=4, n_sink=2, residual=32)"
    text, cache = expected(loaded, "the quick brown fox", spec)
    flags = ["--budget", 16, "--n_sink", 2, "--bits", 4, "--residual", 32]
    code, out, err = cli("--method", "streamingllm+kivi", *flags)
    assert out == text and rows(err)["cache held"] == show.size(cache.nbytes)
    shown = "streamingllm(budget=16, n_sink=2, reindex=True)"
    shown += "+kivi(bits=4, bits_k=0, bits_v=0, group=32, n_sink=2, residual=32, block=1)"
    assert rows(err)["method"].replace(" ", "") == shown.replace(" ", "")
    assert cli("--method", spec)[1] == text


def test_switches(cli):
    for flags, value in ((["--no-reindex"], "False"), (["--reindex"], "True"), ([], "True")):
        assert f"reindex={value}" in rows(cli("--method", "streamingllm", "--budget", "32", *flags)[2])["method"]


def test_flags_fill_in_what_the_spec_leaves_open():
    method = "streamingllm(n_sink=1)+streamingllm(budget=9)"
    (_, first), (_, second) = command.choose(method, {"budget": "33"})
    assert first == {"n_sink": 1, "budget": 33} and second == {"budget": 9}


@pytest.fixture
def invented(monkeypatch, tmp_path):
    """Add a method file whose parameters are of every type; one is named like a general flag."""
    package = sys.modules["nanokv.methods"]  # the attribute of that name is a function
    (tmp_path / "invented.py").write_text(
        textwrap.dedent('''\
        """Do nothing at all.

        Paper: %d pages
        Axis: token
        Idea: -
        Stores: -
        Bytes: -
        Acts: -
        Differs: -
        """
        from dataclasses import dataclass
        from nanokv.method import Policy

        @dataclass
        class Invented(Policy):
            budget: int = 512
            my_rate: float = 0.5
            mode: str = "mean"
            sizes: tuple = (1, 2)
            seed: int = 0
            limits = {"budget": (lambda n: n >= 3, "at least 3")}

            def __post_init__(self):
                super().__post_init__()
                if self.mode == "never":
                    raise NotImplementedError("invented: never is not implemented")
        ''')
    )
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    yield
    sys.modules.pop("nanokv.methods.invented", None)
    package._info.cache_clear()


def test_a_new_method_file_is_all_it_takes(invented, cli, refused, capfd):
    flags = ["--budget", "7", "--my-rate", "1", "--mode", "12", "--sizes", "(3, 4)"]
    code, out, err = cli("--method", "invented(seed=4)", *flags)
    assert code == 0
    shown = "invented(budget=7, my_rate=1, mode='12', sizes=(3, 4), seed=4)"
    assert rows(err)["method"].replace(" ", "") == shown.replace(" ", "")
    assert "invented" in cli("--list-methods")[1]
    assert "--budget 512" in cli("--explain", "invented")[1]
    assert generate.main(["--help"]) == 0
    help = capfd.readouterr().out
    assert "--my-rate VALUE" in help and "invented 0.5" in help
    refused("--method", "invented", "--budget", "2", words="budget must be at least 3")
    refused("--method", "invented", "--mode", "never", words="never is not implemented")
    refused("--method", "invented", "--budget", "5", "--my-rate", "fast", words=["my_rate must be a number", "'fast'"])
    refused("--method", "invented", "--budget", "5", "--sizes", "3", words="sizes must be tuple")


@pytest.mark.parametrize("n, ratio, budget", [(10, 0.25, 3), (9, 0.5, 5), (10, 0.04, 1), (10, 1, 10), (3, 0.1, 1)])
def test_ratio_rounds_as_documented(n, ratio, budget):
    (method,) = parse(f"h2o(ratio={ratio})", n)
    assert method.budget == budget == max(1, int(ratio * n + 0.5))


def test_ratio_is_a_budget(cli, loaded):
    code, out, err = cli("--method", "streamingllm+kivi", "--ratio", "0.5")
    n = len("[user]the quick brown fox[assistant]")
    assert f"budget={n // 2}," in rows(err)["method"].replace(" ", "")
    assert out == cli("--method", "streamingllm+kivi", "--budget", n // 2)[1]
    table = rows(cli("--method", "streamingllm(budget=9)+streamingllm", "--ratio", "1")[2])["method"].replace(" ", "")
    assert "budget=9," in table and f"budget={n}," in table
    inside = cli("--method", "streamingllm(ratio=0.5)+kivi")
    assert inside[0] == 0 and inside[1] == out
    table = rows(cli("--method", "h2o(ratio=0.25)+streamingllm", "--ratio", "0.5")[2])["method"].replace(" ", "")
    assert "h2o(budget=9," in table and "streamingllm(budget=18," in table


@pytest.mark.parametrize("method, shown", [
    ("adakv", "snapkv(budget=9,window=4,kernel=7,pooling='max',reduce='mean')+adakv(alpha=0.3)"),
    ("snapkv+adakv", "snapkv(budget=9,window=4,kernel=7,pooling='max',reduce='mean')+adakv(alpha=0.3)"),
    ("adakv+snapkv", "adakv(alpha=0.3)+snapkv(budget=9,window=4,kernel=7,pooling='max',reduce='mean')"),
])  # fmt: skip
def test_flags_reach_the_policy_that_a_plan_brings_or_the_one_beside_it(cli, refused, method, shown):
    flags = "--window", 4, "--alpha", 0.3
    for size in (("--budget", 9), ("--ratio", 0.25)):
        code, out, err = cli("--method", method, *flags, *size)
        assert code == 0 and rows(err)["method"].replace(" ", "") == shown
    refused("--method", method, "--budget", 0, words="snapkv: budget must be at least")
    refused(
        "--method", "h2o+adakv", "--kernel", 3, words=["--kernel is no parameter of h2o+adakv", "adakv has --alpha"]
    )


def test_ratio_is_refused(refused):
    for value in ("0", "-0.1", "1.01", "nan", "half"):
        refused("--method", "streamingllm", "--ratio", value, words=["--ratio", "above 0 and at most 1", repr(value)])
    refused("--method", "streamingllm", "--ratio", 0.5, "--budget", 9, words="exclude each other")
    refused("--method", "streamingllm(budget=9)", "--ratio", 0.5, words="already given")
    refused("--method", "kivi", "--ratio", 0.5, words=["budget", "--bits"])
    refused("--method", "streamingllm", "--ratio", 0.5, "--n-sink", -1, words="n_sink must be at least 0")
    words = ["n_sink + 1 = 5, got 1", "--ratio 0.01 of 35 prompt tokens"]
    refused("--method", "streamingllm", "--ratio", 0.01, words=words, prompt="the quick brown fo", loads=True)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--method", "nope"], ["unknown method 'nope'", "kivi"]),
        (["--method", ""], "cannot read ''"),
        (["--method", "kivi("], "cannot read 'kivi('"),
        (["--method", "kivi(3)"], "cannot read 'kivi(3)'"),
        (["--method", "kivi(bits=2or 1)"], "cannot read"),
        (["--method", "kivi+full"], ["kivi and full", "storages"]),
        (["--method", "kivi(bitz=2)"], ["no parameter 'bitz'", "bits, bits_k, bits_v, group"]),
        (["--method", "kivi(self=1)"], "no parameter 'self'"),
        (["--method", "h2o(recent=1e999)"], ["h2o: recent must be", "got inf"]),
        (["--method", "cake(gamma=1e999)"], ["cake: gamma must be", "got inf"]),
        (["--method", "\x1b[31m" + "+" * 100_000], "unknown method '\\x1b[31m+++"),
        (["--method", "kivi", "--bits", "9"], "bits must be one of 1, 2, 3, 4, 5, 6, 7, 8, got 9"),
        (["--method", "kivi", "--bits", "two"], "bits must be a whole number, got 'two'"),
        (["--method", "kivi", "--bits", "2or"], "bits must be a whole number, got '2or'"),
        (["--method", "kivi", "--bits", "2.0"], "bits must be a whole number, got 2.0"),
        (["--method", "kivi", "--bits", "True"], "bits must be a whole number, got True"),
        (["--method", "kivi", "--bits", ""], "bits must be a whole number"),
        (["--method", "kivi(bits=2)", "--bits", "4"], "--bits is already given"),
        (["--method", "kivi", "--budget", "5"], ["--budget", "--bits, --bits-k, --bits-v, --group"]),
        (["--method", "kivi", "--no-reindex"], ["--reindex", "--bits, --bits-k, --bits-v, --group"]),
        (["--bits", "2"], ["--bits", "full has no parameters"]),
        (["--method", "streamingllm", "--budget", "0"], "budget must be at least"),
        (["--method", "streamingllm", "--budget", "-5"], "budget must be at least"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--max-new", "5"], "--max-new"),
        (["stray"], "stray"),
        (["--prompt-file", "x"], "not allowed with"),
        (["--max-new-tokens", "-1"], ["--max-new-tokens", "at least 0", "'-1'"]),
        (["--max-new-tokens", "1.5"], "'1.5'"),
        (["--threads", "0"], ["--threads", "from 1"]),
        (["--threads", "1000000"], ["--threads", "to 1024"]),
        (["--chunk", "0"], ["--chunk", "at least 1"]),
        (["--chunk", "9" * 30], "--chunk"),
        (["--temperature", "-0.1"], ["--temperature", "0 or from 0.001 to 1000"]),
        (["--temperature", "nan"], "--temperature"),
        (["--temperature", "inf"], "--temperature"),
        (["--temperature", "1e-310"], "--temperature"),
        (["--top-k", "-1"], ["--top-k", "at least 0"]),
        (["--top-p", "0"], ["--top-p", "above 0 and at most 1"]),
        (["--top-p", "1.1"], "--top-p"),
        (["--min-p", "1"], ["--min-p", "at least 0 and below 1"]),
        (["--repetition-penalty", "0"], ["--repetition-penalty", "from 0.01 to 100"]),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**63)], "--seed"),
        (["--stop", ""], "--stop must not be empty"),
        (["--raw", "--system", "x"], ["--system", "--raw"]),
        (["--load-cache", "x", "--system", "x"], "--system stands before a text"),
        (["--save-cache", ""], "needs a name"),
        (["--compile", "--method", "kivi"], "with the method full"),
        (["--compile", "--compare"], "--compile is for one text"),
        (["--compile", "--backend", "torch"], "--backend auto only"),
        (["--dtype", "int4"], ["int4", "bfloat16"]),
        (["--device", "tpu"], ["tpu", "cpu"]),
        (["--device", "cuda:99"], "cuda:99"),
        (["--explain", "nope"], ["unknown method 'nope'", "kivi"]),
    ],
)
def test_refused_before_the_model_is_loaded(refused, argv, words):
    refused(*argv, words=words)


def test_models_that_cannot_be_loaded(refused, folder, tmp_path):
    refused(words="nope: no such file", model="nope", loads=True)
    refused(words="config.json is missing", model=tmp_path, loads=True)
    refused("--revision", "main", words="revision", loads=True)
    refused("--method", "kivi", "--group", 64, "--bits", 8, words="head_dim 32", loads=True)


def test_running_out_of_memory_is_one_line(refused, monkeypatch):
    def fail(error):
        def generator(*args, **options):
            raise error
            yield

        monkeypatch.setattr(engine, "generate", generator)

    fail(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes.\nmore"))
    refused(words="out of memory: [enforce fail]", loads=True)
    fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\n\nmore"))
    refused(words="CUDA out of memory", loads=True)
    fail(MemoryError())
    refused(words="out of memory", loads=True)
    fail(NotImplementedError("merging into kivi\ncannot be represented"))
    refused(words="merging into kivi cannot", loads=True)


def test_bugs_are_not_hidden(cli, monkeypatch):
    def broken(*args, **options):
        raise error
        yield

    monkeypatch.setattr(engine, "generate", broken)
    for error in (RuntimeError("tensors refer to a single memory location"), KeyError("x"), AssertionError()):
        with pytest.raises(type(error)):
            cli()


def test_dtype_and_threads_and_chunk(cli, monkeypatch):
    before, seen = torch.get_num_threads(), []
    plain = engine.prefill

    def prefill(model, cache, ids, chunk, *rest):
        seen.append((chunk, model.embed_tokens.weight.dtype))
        return plain(model, cache, ids, chunk, *rest)

    monkeypatch.setattr(engine, "prefill", prefill)
    try:
        code, out, err = cli("--dtype", "bf16", "--threads", 1, "--chunk", 5, "--device", "cpu")
        assert rows(err)["dtype, device"] == "bfloat16, cpu, 1 threads"
        assert seen == [(5, torch.bfloat16)]
    finally:
        torch.set_num_threads(before)


def test_compression_is_reported(cli):
    err = cli("--method", "streamingllm", "--budget", 20, prompt="a" * 300)[2]
    smaller = re.fullmatch(r"([\d.]+)x smaller", rows(err)["ratio"])
    assert 4 < float(smaller[1]) < 15
    assert show.compare(390, 100) == "3.9x smaller" and show.compare(100, 115) == "1.15x larger"
    assert show.compare(0, 0) == "-"
    assert [show.size(n) for n in (7, 2048, 3 << 20, 5 << 30)] == ["7 bytes", "2.00 KiB", "3.00 MiB", "5.00 GiB"]


def test_peak_memory_is_optional(cli, monkeypatch):
    monkeypatch.setattr(show, "resource", None)
    assert rows(cli()[2])["peak memory"] == "-"


# ------------------------------------------------------------------------------------------------ showing the methods


@pytest.mark.parametrize("name", EVERY)
def test_explain_prints_the_header(cli, name):
    code, out, err = cli("--explain", name)
    info = find(name)
    assert (code, err) == (0, "") and info.header in out
    for parameter, default in info.parameters.items():
        shown = "(required)" if isinstance(default, type) else repr(default)
        assert f"--{parameter.replace('_', '-')} {shown}\n" in out


def test_list_methods_lists_them_all(cli):
    code, out, err = cli("--list-methods")
    assert (code, err) == (0, "")
    words = re.findall(r"\S+", out)
    for info in available():
        assert {info.name, info.kind, info.axis.split()[0]} <= set(words)
        assert all(show.flag(p) in words for p in info.parameters)
        assert info.paper.split()[-1] in words


def test_help(capfd):
    assert generate.main(["--help"]) == 0
    out, err = capfd.readouterr()
    assert "max(1, floor(R * prompt tokens + 0.5))" in " ".join(out.split()) and not err


# ------------------------------------------------------------------------------------------------- as its own process


def start(*argv, **options):
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it ignored
    try:
        return subprocess.Popen([sys.executable, str(ROOT / "generate.py"), *map(str, argv)], **(pipes | options))
    finally:
        signal.signal(signal.SIGINT, before)


LONG = ("--raw", "--prompt", "abc", "--method", "streamingllm", "--budget", "64", "--max-new-tokens", "1000000")


def test_process_refuses_in_one_line():
    child = start("--method", "nope")
    out, err = child.communicate(timeout=60)
    assert child.returncode == 2 and out == b""
    assert re.fullmatch(rb"generate\.py: error: unknown method 'nope'[^\n]*\n", err)


def test_process_reads_a_pipe(folder, cli):
    child = start("--model", folder, "--max-new-tokens", 12, stdin=subprocess.PIPE)
    out, err = child.communicate("grüße\n".encode(), timeout=60)
    assert child.returncode == 0 and out.decode() == cli(prompt="grüße")[1]


def test_ctrl_c_ends_with_the_table(folder):
    child = start("--model", folder, *LONG)
    first = child.stdout.read1(64)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130 and first and b"Traceback" not in err
    assert rows(err.decode())["new tokens"].endswith("ended by Ctrl-C")


def test_ctrl_c_while_torch_is_imported_is_quiet(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    child = start("--prompt", "abc", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (130, b"", b"")


def test_ctrl_c_while_waiting_for_a_pipe_is_quiet(folder):
    child = start("--model", folder, "--prompt-file", "-", stdin=subprocess.PIPE)
    assert b"waiting for a prompt on standard input" in child.stderr.readline()
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err.strip()) == (130, b"", b"")


def test_a_pipe_that_stays_silent_does_not_block(folder):
    flags = "--method", "streamingllm", "--budget", "32", "--max-new-tokens", "2"
    child = start("--model", folder, *flags, stdin=subprocess.PIPE)
    assert b"nothing comes on standard input, so the built-in prompt is used" in child.stderr.readline()
    assert child.wait(timeout=60) == 0
    child.stdin.close()


@pytest.mark.parametrize("where", [(weights, "load"), (engine, "prefill")])
def test_ctrl_c_before_the_first_token_shows_no_table(cli, monkeypatch, where):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(*where, interrupt)
    code, out, err = cli()
    assert (code, out) == (130, "") and err.strip() == ""


@pytest.mark.parametrize("both", [False, True])
def test_reader_that_goes_away(folder, both):
    child = start("--model", folder, *LONG, stderr=subprocess.STDOUT if both else subprocess.PIPE)
    assert child.stdout.read1(10)
    child.stdout.close()
    assert child.wait(timeout=60) == 0
    if not both:
        assert child.stderr.read() == b""
        child.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(folder):
    with open("/dev/full", "w") as full:
        child = start("--model", folder, "--prompt", "abc", stdout=full)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 2 and re.fullmatch(rb"generate\.py: error: cannot write [^\n]*No space[^\n]*\n", err)


# conversations, saved caches, comparison, JSON


def chat(monkeypatch, capfd, folder, lines, *argv):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    code = generate.main(["--model", str(folder), "--chat", "--max-new-tokens", "8", *map(str, argv)])
    return code, *capfd.readouterr()


def test_a_chat_is_one_conversation_over_one_cache(monkeypatch, capfd, folder, loaded):
    flags = "--method", "kivi", "--residual", "32"
    code, out, err = chat(
        monkeypatch, capfd, folder, ["the quick fox", "", "/cache", "again", "/nope", "/reset", "the quick fox"], *flags
    )
    model, tokenizer = loaded
    talk = Conversation(model, tokenizer, KVCache(model, "kivi(residual=32)"))
    options = {"stop": tokenizer.eos}
    replies = ["".join(engine.text(talk.say(t, 8, **options), tokenizer)) for t in ("the quick fox", "again")]
    assert code == 0 and out == "".join(f"{r}\n" for r in [*replies, replies[0]])
    assert "tokens read" in err and "/nope is no command" in err


def test_a_chat_can_be_saved_and_continued(monkeypatch, capfd, folder, tmp_path):
    whole = chat(monkeypatch, capfd, folder, ["the fox", "again"])[1].splitlines()
    file = tmp_path / "a.cache"
    first = chat(monkeypatch, capfd, folder, ["the fox", f"/save {file}"])[1].splitlines()
    second = chat(monkeypatch, capfd, folder, ["again"], "--load-cache", file)[1].splitlines()
    assert first + second == whole
    assert chat(monkeypatch, capfd, folder, ["the fox"], "--save-cache", tmp_path / "b")[0] == 0
    assert (tmp_path / "b").exists()


def test_a_full_context_does_not_end_a_chat(monkeypatch, capfd, folder):
    code, out, err = chat(monkeypatch, capfd, folder, ["x " * 400, "/reset", "the fox"])
    assert code == 0 and "/reset begins anew" in err and len(out.splitlines()) == 2


def test_saved_text_goes_on_as_if_it_had_not_stopped(cli, tmp_path):
    file = tmp_path / "cache"
    whole = cli("--raw", "--ignore-eos", "--max-new-tokens", 10, "--method", "kivi", prompt="the fox")[1]
    code, first, _ = cli(
        "--raw", "--ignore-eos", "--max-new-tokens", 5, "--method", "kivi", "--save-cache", file, prompt="the fox"
    )
    assert code == 0 and file.exists() and whole.startswith(first)
    code, out, err = cli("--raw", "--load-cache", file, "--max-new-tokens", 3, prompt="jumps")
    assert code == 0 and rows(err)["method"].startswith("kivi(bits=2")


def test_compare_says_where_predictions_part(cli):
    same = rows(cli("--compare", "--ignore-eos")[2])["against full"]
    assert same.startswith("KL 0.0000 nats, top token the same 100.0%") and same.endswith("greedy text is the same")
    lossy = rows(cli("--compare", "--ignore-eos", "--method", "streamingllm", "--budget", 6, "--n-sink", 1)[2])[
        "against full"
    ]
    assert not lossy.startswith("KL 0.0000")


def test_json_holds_the_text_and_everything_measured(cli):
    text = cli("--ignore-eos")[1]
    code, out, err = cli("--ignore-eos", "--json", "--compare")
    data = json.loads(out)
    assert code == 0 and err == "" and data["text"] == text
    assert data["new_tokens"] == len(data["tokens"]) == len(data["compare"]["kl"]) == 12
    assert data["ledger"]["held"] > 0 and data["method"] == "full" and data["compare"]["parted"] is None


def test_a_method_in_a_file_has_flags_too(cli, tmp_path):
    source = (ROOT / "nanokv" / "methods" / "streamingllm.py").read_text()
    file = tmp_path / "mine.py"
    file.write_text(source.replace("n_sink", "anchors"))
    out = cli("--method", file, "--budget", 9, "--anchors", 2)
    assert out[0] == 0 and out[1] == cli("--method", "streamingllm", "--budget", 9, "--n-sink", 2)[1]
    assert f"{file}(budget=9" in rows(out[2])["method"].replace("\n", "")


@pytest.mark.parametrize("argv, words", [
    (["--load-cache", "nowhere"], "nowhere"),
    (["--load-cache", "{damaged}"], "damaged"),
    (["--load-cache", "{damaged}", "--method", "kivi"], "brings its own method"),
    (["--load-cache", "{damaged}", "--compare"], "damaged"),
    (["--save-cache", "no/such/folder/x"], "cannot write"),
    (["--save-cache", "{folder}"], "cannot write"),
    (["--save-cache", "{pipe}"], "there is something that is no file"),
    (["--method", "{leaver}"], "cannot load the method"),
    (["--chat", "--json"], "--chat does not go with"),
    (["--method", "{damaged}.py"], "cannot load the method"),
])  # fmt: skip
def test_these_are_refused_in_one_line(cli, tmp_path, argv, words):
    (tmp_path / "damaged").write_bytes(b"x" * 999)
    names = {"damaged": tmp_path / "damaged", "folder": tmp_path, "pipe": tmp_path / "pipe"}
    os.mkfifo(names["pipe"])
    names["leaver"] = tmp_path / "leaver.py"
    names["leaver"].write_text("raise SystemExit(0)")
    code, out, err = cli(*(a.format(**names) for a in argv))
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and words in err


@pytest.mark.parametrize("backend,words", [("nonsense", "auto, torch, triton, both"), ("triton", "need a GPU")])
def test_a_backend_that_is_not_there_is_refused_in_one_line(cli, backend, words, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, out, err = cli("--backend", backend)
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1 and not out
    assert kernels.backend() == "auto"  # as it was


@pytest.mark.parametrize("method", ["full", "kivi(residual=32)", "h2o(budget=12)"])
def test_both_tells_how_far_the_fast_way_is_from_the_readable_text(cli, method, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, out, err = cli("--backend", "both", "--method", method, "--ignore-eos")
    most, parts = re.fullmatch(r"by at most (\S+) \(per layer: (.*)\)", rows(err)["backends differ"]).groups()
    assert code == 0 and len(parts.split()) == 2 and float(most) == max(map(float, parts.split())) < 1e-5
    assert out == cli("--backend", "torch", "--method", method, "--ignore-eos")[1]


def test_a_wrong_fast_way_is_seen(cli, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    plain = fast_cpu.on_codes
    monkeypatch.setattr(fast_cpu, "on_codes", lambda *args: plain(*args) + 0.5)
    err = cli("--backend", "both", "--method", "kivi(residual=32)", "--ignore-eos")[2]
    assert rows(err)["backends differ"].startswith("by at most 5.0e-01")


def test_compiled_steps_are_asked_for_and_timed(cli, monkeypatch):
    asked = []

    def compiled(model, cache, most):
        asked.append((cache.spec, most))

        def reader(ids, *args, **options):
            if ids.shape[1] == 1 and reader.told:
                reader.told(0.0)
                reader.told = None
            return model(ids, *args, **options)

        for name in ("config", "embed_tokens"):
            setattr(reader, name, getattr(model, name))
        return reader

    monkeypatch.setattr(fast_cpu, "compiled", compiled)
    code, out, err = cli("--compile", "--ignore-eos")
    assert code == 0 and out == cli("--ignore-eos")[1]
    assert asked == [("full", len("[user]the quick brown fox[assistant]") + 12)]
    assert "the first step is being compiled" in err and rows(err)["compiled"].startswith("in 0.0 s")


@pytest.mark.slow  # it compiles
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_compiled_steps_make_the_same_text(cli, dtype):
    flags = "--ignore-eos", "--dtype", dtype
    code, out, err = cli(*flags, "--compile")
    assert code == 0 and out == cli(*flags)[1]
    assert float(rows(err)["compiled"].split()[1]) > 0


def test_compiling_needs_a_compiler(folder, tmp_path):
    env = os.environ | {"CXX": "/nowhere", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    child = start("--model", folder, "--compile", "--prompt", "abc", "--max-new-tokens", 8, env=env)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 2 and b"error: --compile needs a C++ compiler" in err and b"Traceback" not in err


def test_what_compiling_does_not_cover_is_refused_in_words(refused):
    words = "texts within the model's context of 96 tokens only"
    refused("--compile", "--max-new-tokens", 90, words=words, loads=True)


def test_a_policy_that_had_nothing_to_do_says_so(cli):
    err = cli("--method", "snapkv", "--ignore-eos")[2]
    assert "snapkv(budget=512) forgot nothing: 47 tokens; try --ratio 0.25" in err
    assert "forgot nothing" not in cli("--method", "snapkv", "--ratio", 0.25, "--window", 4)[2]
    assert "forgot nothing" not in cli()[2]


def test_numbers_that_are_none_are_one_line(refused, loaded, monkeypatch):
    model, tokenizer = loaded
    broken = tiny.model(context=CONTEXT)
    broken.lm_head.weight[7] = float("nan")
    monkeypatch.setattr(weights, "load", lambda *args: (broken, tokenizer))
    for more in ((), ("--temperature", 1)):
        refused(*more, words="logits for the next token are not finite in float32", loads=True)


def test_a_conversation_goes_on_after_what_cannot_be_done(monkeypatch, capfd, folder, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    lines = [
        "the fox",
        "\udcff\udcfe",
        "/save ",
        "/save a\0b",
        "/save no/such/x",
        f"/save {tmp_path / 'pipe'}",
        "again",
    ]
    code, out, err = chat(monkeypatch, capfd, folder, lines)
    assert code == 0 and out == chat(monkeypatch, capfd, folder, ["the fox", "again"])[1]
    assert "not valid UTF-8" in err and "needs a name" in err and "no/such/x" in err and "is no file" in err
    monkeypatch.setattr(command, "MAX_PROMPT", 64)
    code, out, err = chat(monkeypatch, capfd, folder, ["the fox", "x" * 1000, "again"])
    assert code == 0 and len(out.splitlines()) == 2 and "that line is longer" in err


def test_a_reply_that_a_full_context_cuts_off_says_so(monkeypatch, capfd, folder):
    code, out, err = chat(monkeypatch, capfd, folder, ["the fox"], "--max-new-tokens", 500, "--ignore-eos")
    assert code == 0 and "the model's context of 96 tokens is full; /reset begins anew" in err


def test_a_loaded_cache_can_be_compared(cli, tmp_path):
    for method, same in (("full", True), ("streamingllm(budget=6, n_sink=1)", False)):
        cli("--method", method, "--save-cache", tmp_path / "c", "--ignore-eos")
        code, out, err = cli("--load-cache", tmp_path / "c", "--compare", prompt="on")
        assert code == 0 and rows(err)["against full"].startswith("KL 0.0000 nats") == same


def test_the_table_says_what_decoded(cli):
    code, out, err = cli("--max-new-tokens", 3)
    assert rows(err)["backend"] == "torch, as auto chose"
