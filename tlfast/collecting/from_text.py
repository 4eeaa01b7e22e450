"""`tlfast collect`: from settings to a dataset, by way of a Hugging Face model and text files."""

from __future__ import annotations

from torch import nn

from ..dataset.read.decoding import tokenizer_fingerprint
from ..errors import broken_rule
from ..hooks.points import find_points
from .checks import positions_of
from .determinism import prepare_cuda
from .huggingface import (
    beginning_of_text,
    check_model_name,
    encoder,
    load_model,
    load_tokenizer,
    pick_device,
    portable_name,
)
from .progress import Report
from .resume import check_folder, has_units
from .run import Run
from .settings import CollectSettings, stored_as
from .skipped import BadExamples
from .text import check_plain, cut_texts, find_text_files


def collect_text(settings: CollectSettings, made_by: str) -> Report:
    """Collect the gradients that ``settings`` ask for; cheap checks first, the model last.

    ``made_by`` becomes the first line of config.yaml, a comment.

    Raises:
        ValueError: for bad settings, before the model runs.
        KeyboardInterrupt, Terminated: as `collect`.
    """
    return Collection(settings).collect(settings, made_by)


class Collection:
    """The model and the examples of a run, loaded once: `collect` takes them through as often as it is called."""

    def __init__(self, settings: CollectSettings) -> None:
        """Cheap checks first, the model last."""
        settings.check()
        staging = settings.staging or None
        check_folder(settings.out, settings.resume, settings.overwrite, staging)
        check_model_name(settings.model)
        self.device = device = pick_device(settings.device)
        files = find_text_files(settings.text, settings.pattern)
        if not any(file.path.stat().st_size for file in files):
            got = f"{len(files)} empty file{'s' * (len(files) != 1)}"
            raise ValueError(broken_rule("collect", "text", "hold text", got, "Give files with something in them."))
        if settings.overwrite or settings.extend or not has_units(settings.out):  # what was begun goes on for ever
            check_plain(files, settings.pattern)
        if device.type == "cuda":
            prepare_cuda()
        self.tokenizer = tokenizer = load_tokenizer(settings.model)
        model = load_model(settings.model, stored_as(settings.model_dtype), device, settings.device_map)
        if settings.lens:
            from ..transformer_lens.loading import as_bridge
            from ..transformer_lens.names import find_names

            check_fits(model, settings.seq_len)
            model = as_bridge(model)
            find_names("collect", model, settings.points)
        else:
            find_points("collect", model, settings.points)  # a wrong glob is found before a long text is cut
            check_fits(model, settings.seq_len)
        self.bad = bad = BadExamples(settings.bad_examples)
        self.model: nn.Module = model
        self.examples = cut_texts(
            files,
            encoder(tokenizer),
            settings.seq_len,
            max_examples=settings.max_examples or None,
            first=beginning_of_text(tokenizer, settings.bos),
            bad=bad,
        )

    def collect(
        self, settings: CollectSettings, made_by: str, progress: bool = True, share: tuple[int, int] | None = None
    ) -> Report:
        """`tlfast.collect` with these settings, which differ from those loaded in units, out or the like at most."""
        tokenizer = self.tokenizer
        options = settings.to_options(
            pad_id=tokenizer.pad_token_id or 0,
            share=share,
            skipped=self.bad.skipped,
            progress=progress,
            header={
                "model": {"name": portable_name(settings.model)},
                "tokenizer": {"class": type(tokenizer).__name__, "fingerprint": tokenizer_fingerprint(tokenizer)},
                "text": {"seq_len": settings.seq_len, "bos": settings.bos},
            },
            config=settings.to_yaml(f"{made_by}, {settings.device_map or self.device}"),
        )
        return Run(self.model, self.examples, settings.out, options).collect()


def check_fits(model: nn.Module, seq_len: int) -> None:
    n_positions = positions_of(model)
    if n_positions is not None and seq_len > n_positions:
        rule = f"be at most {n_positions}, the positions of the model"
        raise ValueError(broken_rule("collect", "seq_len", rule, seq_len, "Give a smaller --seq-len."))
