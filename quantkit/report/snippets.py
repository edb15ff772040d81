"""Lines that run an ONNX artifact: for its model card, and as one command for a terminal."""

from __future__ import annotations

import json
import shlex

from quantkit.formats.onnx.names import GRAPH


def decoder_lines(folder: str) -> str:
    """Return Python that continues a text with ONNX Runtime GenAI."""
    return f"""\
import onnxruntime_genai as og

model = og.Model({json.dumps(folder)})
tokenizer = og.Tokenizer(model)
# As transformers does; it begins texts with nothing otherwise.
tokenizer.update_options(add_special_tokens="true")
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=64)
generator = og.Generator(model, parameters)
generator.append_tokens(tokenizer.encode("Once upon a time"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
"""


def encoder_lines(folder: str) -> str:
    """Return Python that lets ONNX Runtime encode (or classify) a text."""
    return f"""\
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({json.dumps(folder)})
session = onnxruntime.InferenceSession({json.dumps(f"{folder}/{GRAPH}")})
texts = ["A first text", "and another one"]
tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
inputs = {{each.name: tokens[each.name] for each in session.get_inputs()}}
print(session.run(None, inputs)[-1])
"""


def decoder_command(folder: str) -> str:
    """Return `decoder_lines` as one line of a shell, of up to 64 tokens."""
    return _command(
        "import onnxruntime_genai as og",
        f"m = og.Model({json.dumps(folder)})",
        "t, p = og.Tokenizer(m), og.GeneratorParams(m)",
        't.update_options(add_special_tokens="true")',
        "p.set_search_options(max_length=64)",
        "g = og.Generator(m, p)",
        'g.append_tokens(t.encode("Once upon a time"))',
        "list(iter(lambda: g.is_done() or g.generate_next_token(), True))",
        "print(t.decode(g.get_sequence(0)))",
    )


def encoder_command(folder: str) -> str:
    """Return `encoder_lines` as one line of a shell, for one text."""
    return _command(
        "import onnxruntime as ort, transformers",
        f"t = transformers.AutoTokenizer.from_pretrained({json.dumps(folder)})",
        f"s = ort.InferenceSession({json.dumps(f'{folder}/{GRAPH}')})",
        'x = t(["A text"], return_tensors="np")',
        "print(s.run(None, {i.name: x[i.name] for i in s.get_inputs()})[-1])",
    )


def _command(*statements: str) -> str:
    return shlex.join(["python", "-c", "; ".join(statements)])
