"""Images and sounds: decoded, and made what a model takes by the processor that lies beside it."""

from __future__ import annotations

import inspect
import io
import platform
import wave
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from ..dataset.errors import extra
from ..dataset.read.pretrained import from_pretrained
from ..errors import broken_rule
from .data_files import version_of
from .fields import BadField
from .skipped import without_addresses

Kind = Literal["image", "audio"]
NO_FILE = ", no file that can be read"
_WHO = "collect"
SUFFIXES: dict[str, tuple[str, ...]] = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    "audio": (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a"),
}
INPUTS = {"pixel_values": "image", "input_values": "audio", "input_features": "audio"}  # as models call them
_LOADERS = {"image": "AutoImageProcessor", "audio": "AutoFeatureExtractor"}
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by the channels of a model
_WIDE_MODES = ("I", "F")  # how modes begin that have more than 8 bits a channel


class Sound(NamedTuple):
    """A sound of one channel: float32 [samples] in -1 to 1, and how many samples are a second."""

    samples: np.ndarray[Any, Any]
    rate: int


def kind_of(model: Any) -> str:
    """What a model reads: "image", "audio" or "text"."""
    names = inspect.signature(type(model).forward).parameters
    return "text" if "input_ids" in names else INPUTS.get(getattr(model, "main_input_name", ""), "text")


def media_bytes(value: Any, folder: Path, name: str) -> bytes:
    """The bytes of the file that a cell is: they themselves, a path, or a mapping with one of both, as datasets has it.

    Paths are relative to ``folder``. BadField for a cell that is none of these.
    """
    if isinstance(value, Mapping) and {"bytes", "path"} & set(value):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and value:
        path = folder / value
        try:
            if path.is_file():
                return path.read_bytes()
        except (OSError, ValueError):
            pass
        # Its last part: where data lie differs by machine, and a dataset holds this as the reason of what it left out.
        raise BadField(f"{name} names {Path(value).name[:80]!r}{NO_FILE}")
    raise BadField(f"{name} is {'empty' if value in (None, '') else f'a {type(value).__name__}'}, no file or its bytes")


def image_of(data: bytes, mode: str, name: str) -> Any:
    """The image in the bytes of a file, of PIL, upright, in a mode of 8 bits a channel; BadField for what is none.

    Of several images it is the first; what is transparent keeps its colour.
    """
    image, turning = extra("PIL.Image", _WHO, "media"), extra("PIL.ImageOps", _WHO, "media")
    try:
        with image.open(io.BytesIO(data)) as opened:
            opened.load()
            if opened.mode.startswith(_WIDE_MODES):
                raise BadField(f"{name} has more than 8 bits a channel ({opened.mode})")
            return turning.exif_transpose(opened).convert(mode)
    except BadField:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, image.DecompressionBombError) as error:
        raise BadField(f"{name} is no image ({_short(error)})") from None


def sound_of(data: bytes, name: str) -> Sound:
    """The sound in the bytes of a file, the mean of its channels; BadField for what is none.

    WAV of whole numbers is read here, others by soundfile.
    """
    try:
        with wave.open(io.BytesIO(data)) as opened:
            width, channels, rate = opened.getsampwidth(), opened.getnchannels(), opened.getframerate()
            values = _samples(opened.readframes(opened.getnframes()), width)
    except (wave.Error, EOFError) as error:
        if not data or (data[:4] == b"RIFF" and "unknown format" not in str(error)):
            raise BadField(f"{name} is no sound ({_short(error)})") from None
        files = extra("soundfile", _WHO, "media")
        try:
            values, rate = files.read(io.BytesIO(data), dtype="float32", always_2d=True)
        except (RuntimeError, ValueError, TypeError) as error:  # its own is a RuntimeError
            raise BadField(f"{name} is no sound ({_short(error)})") from None
        channels = values.shape[1]
    found = values[: len(values) - len(values) % channels].reshape(-1, channels)
    if not found.size:
        raise BadField(f"{name} has no samples")
    return Sound(found[:, 0] if channels == 1 else found.mean(1, dtype=np.float32), int(rate))


def _samples(data: bytes, width: int) -> np.ndarray[Any, Any]:
    """Whole numbers of 1 to 4 bytes as float32 in -1 to 1."""
    if width == 1:
        return ((np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128).astype(np.float32)
    if width == 3:  # as the upper bytes of four
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data[: len(wide) * 3], np.uint8).reshape(-1, 3)
        return (wide.view("<i4")[:, 0] / 2.0**31).astype(np.float32)
    whole = np.frombuffer(data[: len(data) - len(data) % width], f"<i{width}")
    return (whole / 2.0 ** (8 * width - 1)).astype(np.float32)


def _short(error: BaseException) -> str:
    """What an error says, the same in every process: a dataset holds it as the reason why an example is none."""
    return " ".join(without_addresses(str(error)).split())[:80] or type(error).__name__


def decoded_by() -> dict[str, str]:
    """What images and sounds are decoded and resized by: libraries with their versions, and the kind of processor."""
    versions = {name: version_of(name) for name in ("pillow", "soundfile", "torchvision")}
    return versions | {"machine": platform.machine(), "simd": torch.backends.cpu.get_cpu_capability()}


class Processor:
    """Makes the fields of an example of the bytes of an image or a sound.

    Args:
        name: of the model, beside which its image processor or feature extractor lies.
        kind: "image" or "audio".
        model: takes the fields.
        takes: the names of those that its forward takes.
        truncate: cut sounds that are longer than what the model reads, in place of leaving them out.
        trust: run the code that lies beside the model.

    Raises:
        ValueError: where there is no processor beside the model.
    """

    def __init__(
        self, name: str, kind: Kind, model: Any, takes: Collection[str], truncate: bool = False, trust: bool = False
    ) -> None:
        self._own = from_pretrained(_LOADERS[kind], name, _WHO, "model", trust_remote_code=trust)
        self.kind, self._takes, self._truncate = kind, takes, truncate
        channels = getattr(getattr(model, "config", None), "num_channels", 3)
        self._mode = _MODES.get(channels if isinstance(channels, int) else 3, "RGB")

    def fields(self, data: bytes, name: str) -> dict[str, torch.Tensor]:
        """The fields of one example, each without the dimension of the batch; BadField where there are none."""
        if self.kind == "image":
            made = self._own(images=image_of(data, self._mode, name), return_tensors="pt")
        else:
            made = self._own(self._fitting(sound_of(data, name), name), **self._of_sound)
        found = {key: value for key, value in made.items() if key in self._takes}
        odd = next((k for k, v in found.items() if not isinstance(v, torch.Tensor) or len(v) != 1), None)
        if odd is not None or not found:
            rule, got = "make one tensor of each that the model takes", odd or ", ".join(map(str, made))
            remedy = "From Python, tlfast.collect takes fields of your own making."
            raise ValueError(broken_rule(_WHO, type(self._own).__name__, rule, got, remedy))
        return {key: value[0] for key, value in found.items()}

    def told(self) -> list[Any] | None:
        """What decides what becomes of a file, as JSON; None where nobody knows: of code beside the model."""
        if not type(self._own).__module__.startswith("transformers."):
            return None
        own = [type(self._own).__qualname__, self._own.to_json_string()]
        return [*own, self.kind, self._mode, sorted(self._takes), self._truncate]

    @property
    def _of_sound(self) -> dict[str, Any]:
        return {"sampling_rate": self._own.sampling_rate, "return_tensors": "pt"}

    def _fitting(self, sound: Sound, name: str) -> np.ndarray[Any, Any]:
        """The samples, as many of them as are read."""
        rate, most = self._own.sampling_rate, _most_samples(self._own)
        if sound.rate != rate:
            raise BadField(f"{name} has {sound.rate} samples a second, the model {rate}")
        if most is not None and len(sound.samples) > most:
            if not self._truncate:
                raise BadField(f"{name} has {len(sound.samples)} samples, more than the {most} that are read")
            return sound.samples[:most]
        return sound.samples


def _most_samples(extractor: Any) -> int | None:
    """How many samples an extractor reads, which would leave out the others without a word; None: any number."""
    if hasattr(extractor, "n_samples"):  # of Whisper: windows of 30 s
        return int(extractor.n_samples)
    if type(extractor).__name__.startswith("AST"):  # frames of 25 ms, 10 ms apart
        rate = extractor.sampling_rate
        return int((extractor.max_length - 1) * rate // 100 + rate // 40)
    return None
