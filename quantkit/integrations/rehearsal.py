"""All that a job can refuse, before a training starts: `python -m quantkit.integrations.rehearsal`.

Everything is done that `quantkit quantize` does before its work: the recipe is planned on the
model, all data is read, and the runtimes of the gate are looked for. It runs in a process of its
own, so that the training's threads, devices and random numbers stay as they are.
"""

from __future__ import annotations

import json
import sys
import traceback

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.encoder_pipeline.job import prepare_encoder
from quantkit.encoders.architectures import is_encoder
from quantkit.errors import QuantkitError
from quantkit.gating import prepare_job_tools
from quantkit.inputs import check_inputs, load
from quantkit.integrations.alone import write_answer
from quantkit.job import prepare


def rehearse(recipe: str, model: str, output: str, overrides: tuple[str, ...], device: str) -> None:
    """Do all of a job that comes before its work; nothing is written.

    Raises:
        InputError, ResourceError: whatever would stop the job.
    """
    loaded = load(recipe, model, output, overrides)
    check_inputs(loaded, overwrite=True)
    checkpoint = open_checkpoint(resolve_source(loaded.model))
    if is_encoder(checkpoint.config):
        prepare_encoder(loaded, checkpoint, device=device, gate=True)
    else:
        prepare_job_tools(prepare(loaded, checkpoint, device=device, gate=True))


def main() -> int:
    """Rehearse the job that the first argument describes; say on stdout what is wrong with it."""
    recipe, model, output, overrides, device = json.loads(sys.argv[1])
    try:
        rehearse(recipe, model, output, tuple(overrides), device)
    except QuantkitError as error:
        traceback.print_exc()
        write_answer({"error": str(error)})
        return error.exit_code
    write_answer({})
    return 0


if __name__ == "__main__":
    sys.exit(main())
