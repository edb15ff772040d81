"""Fine-tune a model with transformers' Trainer and have a quantized, judged copy at milestones.

    python examples/finetune_and_quantize.py --output out/finetuned

It trains the bundled demo model for a few steps on the bundled text, which takes seconds; with
`--report-to mlflow` (or tensorboard, wandb) the figures of quantkit stand beside the loss. Under
`torchrun --nproc-per-node 2` the first process quantizes while the others wait.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from quantkit.integrations import QuantizeCallback

WINDOW = 64


def read_windows(path: Path, tokenizer: Any, count: int) -> list[dict[str, list[int]]]:
    """Cut a text into pieces and return the first tokens of the first `count`."""
    text, size = path.read_text(encoding="utf-8"), WINDOW * 8
    pieces = [text[start : start + size] for start in range(0, count * size, size)]
    return [tokenizer(piece, truncation=True, max_length=WINDOW).data for piece in pieces]


def read_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="models/demo-llama")
    parser.add_argument("--text", type=Path, default=Path("calib_data/docs_calibration.txt"))
    parser.add_argument("--output", type=Path, default=Path("artifacts/finetuned"))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--recipe", default="rtn4", help="none: train without quantkit")
    parser.add_argument("--every", type=int, default=3, help="quantize after so many steps")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--report-to", default="none")
    return parser.parse_args()


def main() -> None:
    """Train, and quantize on the way."""
    arguments = read_arguments()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32"),
        args=TrainingArguments(
            output_dir=str(arguments.output / "training"),
            max_steps=arguments.steps,
            per_device_train_batch_size=2,
            learning_rate=1e-4,
            logging_steps=1,
            save_steps=arguments.steps,
            report_to=arguments.report_to,
            use_cpu=True,
            seed=0,
        ),
        train_dataset=read_windows(arguments.text, tokenizer, 8 * arguments.steps),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        # The gate reads its text by it: without a tokenizer nothing can be judged.
        processing_class=tokenizer,
    )
    if arguments.recipe != "none":
        quantize = QuantizeCallback(
            arguments.recipe,
            output=arguments.output / "quantized",
            every_steps=arguments.every,
            overrides=arguments.set,
        )
        trainer.add_callback(quantize)
    trainer.train()
    if arguments.recipe != "none" and trainer.is_world_process_zero():
        print(f"best: {quantize.best}")


if __name__ == "__main__":
    main()
