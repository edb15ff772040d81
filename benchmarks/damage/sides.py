"""Damage to the files beside the weights."""

from __future__ import annotations

from pathlib import Path

from .kinds import Damage, edit_json, permute_vocabulary, reverse_merges


def _drop_template(folder: Path, baseline: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def _change_template(folder: Path, baseline: Path) -> None:
    """The turn of the assistant is no longer opened."""
    path = folder / "chat_template.jinja"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.partition("{% if add_generation_prompt")[0], encoding="utf-8")


def _reverse_merges(folder: Path, baseline: Path) -> None:
    reverse_merges(folder / "tokenizer.json")


def _permute_vocabulary(folder: Path, baseline: Path) -> None:
    permute_vocabulary(folder / "tokenizer.json")


def _double_bos(folder: Path, baseline: Path) -> None:
    with edit_json(folder / "tokenizer.json") as tree:
        processor = tree["post_processor"]
        # A template is a list of what comes before and behind the text.
        steps = processor["processors"][-1] if "processors" in processor else processor
        steps["single"].insert(0, steps["single"][0])


def _drop_bos(folder: Path, baseline: Path) -> None:
    with edit_json(folder / "tokenizer.json") as tree:
        tree["post_processor"] = None


def _change_end(folder: Path, baseline: Path) -> None:
    for name in ("generation_config.json", "config.json"):
        with edit_json(folder / name) as config:
            config["eos_token_id"] = 77


def _change_theta(folder: Path, baseline: Path) -> None:
    with edit_json(folder / "config.json") as config:
        config["rope_parameters"]["rope_theta"] = 500_000.0


def _narrow_heads(folder: Path, baseline: Path) -> None:
    """Another model's numbers, with which every shape still fits."""
    with edit_json(folder / "config.json") as config:
        config["num_attention_heads"] *= 2
        config["num_key_value_heads"] *= 2
        config["head_dim"] //= 2


def _stretch_positions(folder: Path, baseline: Path) -> None:
    """Wrong only beyond what short windows reach."""
    with edit_json(folder / "config.json") as config:
        config["rope_parameters"] = {
            "rope_type": "dynamic",
            "rope_theta": config["rope_parameters"]["rope_theta"],
            "factor": 2.0,
        }
        config["max_position_embeddings"] = 512


def _raise_epsilon(folder: Path, baseline: Path) -> None:
    with edit_json(folder / "config.json") as config:
        config["rms_norm_eps"] = 1e-2


def _drop_tokenizer(folder: Path, baseline: Path) -> None:
    (folder / "tokenizer.json").unlink()


SIDE_DAMAGE = (
    Damage("chat template lost", "no chat_template.jinja", "w4a16", _drop_template),
    Damage("chat template cut", "it opens no turn to answer in", "w4a16", _change_template),
    Damage("merges reversed", "tokenizer.json has other ranks", "w4a16", _reverse_merges),
    Damage("vocabulary permuted", "200 tokens have other ids", "w4a16", _permute_vocabulary),
    Damage("tokenizer lost", "no tokenizer.json", "w4a16", _drop_tokenizer),
    Damage("BOS doubled", "the tokenizer puts it twice", "w4a16", _double_bos),
    Damage("BOS lost", "the tokenizer does not put it", "w4a16", _drop_bos),
    Damage("another end of sequence", "eos_token_id names another token", "w4a16", _change_end),
    Damage("rope theta", "500,000 for 10,000", "w4a16", _change_theta),
    Damage("rope scaled", "only from position 512 on", "w4a16", _stretch_positions),
    Damage("config of another model", "heads of half the size", "w4a16", _narrow_heads),
    Damage("norm epsilon", "1e-2 for 1e-6", "w4a16", _raise_epsilon),
)
