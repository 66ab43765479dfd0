"""One worker: reads a job, then scans, from its standard input; answers on its standard output.

Started by `client/latents/workers.py`, which says what the lines are; ends when its input does. Whatever a
library prints goes to the standard error, so that answers stay whole.
"""

import json
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

import torch

from client.latents.encoding import Encoder, Ready, encode_each, prepare_each
from client.latents.workers import Job, answer_lines, error_line
from client.scans.judgement import Source
from meduet_models.tokenizer.tokenizer import load_tokenizer
from storage.files import keep_to_owner


def main() -> int:
    """Answer until the input ends; returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    signal.signal(signal.SIGTERM, _end)
    keep_to_owner()
    torch.set_num_threads(1)
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        try:
            _work(sys.stdin.buffer, answers)
        except BrokenPipeError:  # nobody listens any more
            return 0
        except (OSError, ValueError, MemoryError) as error:
            _say(answers, [error_line(error)])
            return 1
    return 0


def _work(questions: IO[bytes], answers: IO[bytes]) -> None:
    job = Job.from_json(json.loads(questions.readline()))
    preparation = job.preparation()
    sent: dict[Path, Ready] = {}

    def send(batch: Sequence[Ready]) -> None:
        sent.update((one.path, one) for one in batch)

    write = send
    if job.encodes:
        tokenizer = load_tokenizer(job.tokenizer)
        if tokenizer.sha256 != job.tokenizer_sha256:
            raise ValueError(
                f"Expected tokenizer {job.tokenizer_sha256[:8]}…, which this site encodes with; the one that "
                f"its settings name is {tokenizer.sha256[:8]}…. Prepare with one worker."
            )
        write = Encoder(tokenizer, "cpu", preparation).write
    _say(answers, [b"{}\n"])
    for line in questions:
        sources = list(map(Source.from_json, json.loads(line)))
        for number, verdict, paths in encode_each(
            prepare_each(preparation, sources, ahead=1), write, preparation.at_once
        ):
            ready = [sent[path] for path in paths] if not job.encodes else []
            _say(answers, answer_lines(number, verdict, paths if job.encodes else [], ready))
        sent.clear()


def _say(answers: IO[bytes], lines: Iterable[bytes]) -> None:
    for line in lines:
        answers.write(line)
    answers.flush()


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
