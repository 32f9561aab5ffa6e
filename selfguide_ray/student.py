"""The student model as files: where it lies, what identifies it, and its tokenizer."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfguide_ray.config import Student
from selfguide_ray.embedded import resolve
from selfguide_ray.errors import SelfGuideError

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
DEFAULT_CONTEXT = 4096  # for models that name no limit
SAMPLE = 1 << 20  # bytes hashed at both ends of a weights file


def locate(student: Student) -> str:
    """The model's local folder, or the hub name as it is.

    Raises SelfGuideError if the folder is not there or holds no model in safetensors.
    """
    folder = resolve(student.model)
    looks_like_path = student.model.startswith(("/", ".", "~", "embedded/")) or student.model.count("/") != 1
    if not folder.is_dir():
        if looks_like_path:
            raise SelfGuideError(
                f"student.model: {student.model} does not exist.",
                "The student is read from a folder with config.json, tokenizer files and safetensors weights.",
                "Give such a folder, a hub name such as org/model, or embedded/nano.",
            )
        return student.model
    lacking = [name for name in ("config.json", "*.safetensors") if not list(folder.glob(name))]
    if lacking:
        raise SelfGuideError(
            f"student.model: {student.model} holds no {' and no '.join(lacking)}.",
            "Only weights in safetensors are read; pickled ones can run code.",
            "Save the model with save_pretrained.",
        )
    return str(folder)


def facts(student: Student) -> dict[str, Any]:
    """What identifies the student in `_settings.json` and `model.json`: its name, fingerprints of model and tokenizer.

    A hub model is identified by its revision, which covers the tokenizer. Raises SelfGuideError if it cannot be found.
    """
    if student.engine == "scripted":
        return {"model": student.model, "fingerprint": "scripted"}
    location = locate(student)
    if Path(location).is_dir():
        folder = Path(location)
        return {"model": student.model, "fingerprint": _fingerprint(folder), "tokenizer": _hash_of(folder, TOKENIZER)}
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        config = Path(hf_hub_download(location, "config.json"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise SelfGuideError(
            f"student.model: {student.model} is neither a local folder nor a model the hub gives us: {type(error).__name__}.",
            "The name may be misspelt, the model gated, or the network closed.",
            "Download it and give the folder, or use embedded/nano.",
        ) from error
    return {"model": student.model, "fingerprint": config.parent.name}


def _fingerprint(folder: Path) -> str:
    """Hash of the small files whole and of the weights' sizes and both ends: seconds for any size of model."""
    state = hashlib.blake2b(_hash_of(folder, ("config.json", *TOKENIZER)).encode(), digest_size=8)
    for path in sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)}):
        size = path.stat().st_size
        with path.open("rb") as file:
            state.update(json.dumps([path.name, size]).encode() + file.read(SAMPLE))
            file.seek(max(0, size - SAMPLE))
            state.update(file.read(SAMPLE))
    return state.hexdigest()


def _hash_of(folder: Path, names: Sequence[str]) -> str:
    """Hash of some files of a folder, those that are not there left out."""
    state = hashlib.blake2b(digest_size=8)
    for name in names:
        if (folder / name).exists():
            state.update(name.encode() + (folder / name).read_bytes())
    return state.hexdigest()


def context_of(student: Student) -> int:
    """Tokens that prompt and completion may take together."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(locate(student), trust_remote_code=student.trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None) or DEFAULT_CONTEXT


class StudentTokenizer:
    """A Hugging Face tokenizer behind the protocol of `schema.Tokenizer`."""

    def __init__(self, student: Student) -> None:
        from transformers import AutoTokenizer

        self.hf = AutoTokenizer.from_pretrained(locate(student), trust_remote_code=student.trust_remote_code)
        if self.hf.eos_token is None:
            raise SelfGuideError(
                f"student.model: the tokenizer of {student.model} has no EOS token.",
                "The student could never learn to stop.",
                "Set eos_token in tokenizer_config.json.",
            )
        self.eos: str = self.hf.eos_token
        adds_bos = self.hf.bos_token is not None and self.hf.bos_token_id in self.hf("")["input_ids"]
        self.bos: str = self.hf.bos_token if adds_bos else ""
        added = [token.content for token in self.hf.added_tokens_decoder.values() if token.special]
        self.special_tokens = tuple(dict.fromkeys([*self.hf.all_special_tokens, *added]))
        self._special_ids = set(self.hf.convert_tokens_to_ids(list(self.special_tokens)))
        self._normalizer = self.hf.backend_tokenizer.normalizer if self.hf.is_fast else None
        self._marks = {*self.special_tokens, *map(self._normalized, self.special_tokens)} - {""}

    def eos_ids(self, named: int | list[int] | None) -> set[int]:
        """Tokens that end a text: the tokenizer's, and those that a model names besides."""
        return {self.hf.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens in the text are parsed, none is added."""
        return self.hf.encode(text, add_special_tokens=False)

    def special_spans(self, text: str) -> list[tuple[int, int]]:
        """Where special tokens are parsed, also where only the normalised text has one (full-width letters under NFKC)."""
        normalized = self._normalized(text)
        if not any(mark in text or mark in normalized for mark in self._marks):
            return []
        if not self.hf.is_fast:
            return [m.span() for mark in self._marks for m in re.finditer(re.escape(mark), text)]
        read = self.hf(text, add_special_tokens=False, return_offsets_mapping=True)
        return [
            span
            for token, span in zip(read["input_ids"], read["offset_mapping"], strict=True)
            if token in self._special_ids
        ]

    def _normalized(self, text: str) -> str:
        return text if self._normalizer is None else self._normalizer.normalize_str(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids without special tokens."""
        return self.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def chat(self, messages: list[dict[str, str]]) -> str | None:
        """The messages in the model's chat format, ending in the assistant's header; None without a format."""
        if not self.hf.chat_template:
            return None
        return self.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
