"""Checks of the student, before its weights are loaded: that it is there, and how it reads and ends a prompt."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

from selfguide_ray import reference
from selfguide_ray.doctor import Finding, Patient
from selfguide_ray.engine import check_engine
from selfguide_ray.prompts import Prompts
from selfguide_ray.student import locate

UNBOUNDED = 1 << 30  # tokens of a prompt whose length is not what is looked at
ANSWER = "seven"


def student(patient: Patient) -> Iterator[Finding]:
    """The model is there, its config.json can be read, and its engine is installed."""
    settings = patient.config.student
    check_engine(settings)
    if settings.engine == "scripted":
        yield Finding("ok", "scripted: a stand-in without a model.")
        return
    fingerprint, place = patient.facts["fingerprint"], Path(locate(settings))
    if not place.is_dir():
        yield Finding("ok", f"{settings.model} from the hub, revision {fingerprint}.")
        return
    told = json.loads((place / "config.json").read_text(encoding="utf-8"))
    if "auto_map" in told and not settings.trust_remote_code:
        yield Finding(
            "warning",
            f"{settings.model} brings Python code, which is not run.",
            "If it does not load, read that code and set student.trust_remote_code=true.",
        )
    name = ", ".join(told.get("architectures") or ["no architecture named"])
    yield Finding("ok", f"{settings.model}: {name}, fingerprint {fingerprint}.")


def ending(patient: Patient) -> Iterator[Finding]:
    """EOS is one token, and the last thing that training teaches, also where the pad token is the same."""
    import pyarrow as pa
    import torch

    from selfguide_ray.tuning.layout import lay_out
    from selfguide_ray.tuning.pairs import read_pairs

    tokenizer, hf = patient.tokenizer, _hf(patient)
    eos = tokenizer.encode(tokenizer.eos)
    if len(eos) != 1:
        yield Finding(
            "wrong",
            f"EOS {tokenizer.eos!r} is {len(eos)} tokens.",
            "Set eos_token to a special token of the tokenizer.",
        )
        return
    prompts = _prompts(patient)
    prompt = prompts.answering(patient.task, patient.task.examples[0].input)
    rows = pa.table({"prompt": [prompt.text], "completion": [prompts.completion(ANSWER)]})
    pair = read_pairs(patient.task.name, rows, tokenizer, UNBOUNDED)[0]
    taught = lay_out([[pair]], torch.device("cpu"), torch.float32).targets[0].tolist()
    if taught != list(pair.completion) or taught[-1] != eos[0]:
        yield Finding(
            "wrong",
            f"Training would teach {taught} and not {[*pair.completion[:-1], eos[0]]}.",
            "Take another tokenizer.",
        )
        return
    pad = hf is not None and hf.pad_token_id == eos[0]
    note = "; the pad token is the same, and the loss goes by position" if pad else ""
    yield Finding("ok", f"EOS {tokenizer.eos!r} is one token and is learned{note}.")


def beginning(patient: Patient) -> Iterator[Finding]:
    """A rendered prompt begins with one BOS or none."""
    tokenizer, hf = patient.tokenizer, _hf(patient)
    bos = None if hf is None else hf.bos_token_id
    prompt = _prompts(patient).answering(patient.task, patient.task.examples[0].input)
    count = len(list(takewhile(lambda token: token == bos, prompt.ids))) if bos is not None else 0
    if count > 1:
        yield Finding(
            "wrong",
            f"A prompt begins with {count} BOS tokens ({hf.bos_token!r}).",
            "Take BOS out of the chat template: an engine adds none, and the student never saw two.",
        )
    elif not count and tokenizer.bos:
        yield Finding(
            "warning",
            f"The tokenizer puts {tokenizer.bos!r} before a text, and the chat template does not.",
            "Look at how the model was trained; if with BOS, add it to the chat template.",
        )
    else:
        yield Finding("ok", f"A prompt begins with {'one BOS' if count else 'no BOS'}, as the model has it.")


def chat(patient: Patient) -> Iterator[Finding]:
    """The chat template renders, ends in the header that it puts before an answer, and ends a turn with EOS."""
    hf, tokenizer = _hf(patient), patient.tokenizer
    asked = [
        {"role": "user", "content": "two and two"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "three and four"},
    ]
    text = tokenizer.chat(asked)
    if hf is None or text is None:
        yield Finding("ok", "There is no chat template: prompts are plain text, USER: and ASSISTANT: before each turn.")
        return
    bare = hf.apply_chat_template(asked, tokenize=False, add_generation_prompt=False)
    answered = hf.apply_chat_template(
        [*asked, {"role": "assistant", "content": ANSWER}], tokenize=False, add_generation_prompt=False
    )
    if not answered.startswith(text + ANSWER):
        yield Finding(
            "warning",
            f"A prompt ends in {text[-40:]!r}, and an answered one does not go on from there.",
            "Make the chat template's add_generation_prompt write what stands before an answer.",
        )
    elif text == bare:
        yield Finding("ok", f"The chat template has no header of its own; a prompt ends in {text[-24:]!r}.")
    else:
        yield Finding("ok", f"The chat template ends a prompt in the header {text[len(bare) :]!r}.")
    end = answered.rpartition(ANSWER)[2].strip()
    if not end.startswith(tokenizer.eos):
        yield Finding(
            "warning",
            f"The chat template ends an answer with {end!r}, and the student is taught {tokenizer.eos!r}.",
            "Set eos_token in tokenizer_config.json to the end of a turn; untrained, it would talk on.",
        )


def sameness(patient: Patient) -> Iterator[Finding]:
    """Annotation, training and prediction see the same bytes of a prompt (statement 18)."""
    method, task = patient.config.method, patient.task
    text = task.examples[-1].input
    prompt, annotated = (
        kind[method](patient.tokenizer, UNBOUNDED) for kind in (reference.PROMPTS, reference.ANNOTATION)
    )
    mine, theirs = prompt.answering(task, text), annotated.answering(task, text)
    if tuple(patient.tokenizer.encode(mine.text)) != mine.ids:
        yield Finding("wrong", "The same prompt is not the same tokens twice.", "Take another tokenizer.")
    elif mine.text == theirs.text:
        yield Finding(
            "ok", f"Annotation, training and prediction render the same prompt, {len(mine.text.encode())} bytes."
        )
    elif method == "reference":
        yield Finding(
            "ok", "Annotation ends in the bare header, training and prediction in a newline, as the reference has it."
        )
    else:
        yield Finding("wrong", "Annotation and prediction render different prompts.", "Make them one renderer's.")


def escaping(patient: Patient) -> Iterator[Finding]:
    """Special tokens that stand in a task's text are broken up, and none reaches the student as what it means."""
    tokenizer, prompts = patient.tokenizer, _prompts(patient)
    special = {ids[0]: token for token in tokenizer.special_tokens if len(ids := tokenizer.encode(token)) == 1}
    plain, hostile = (
        Counter(prompts.answering(patient.task, text).ids) for text in ("x", " ".join(["x", *tokenizer.special_tokens]))
    )
    through = [token for number, token in special.items() if hostile[number] > plain[number]]
    taught = Counter(tokenizer.encode(prompts.completion(" ".join(tokenizer.special_tokens))))
    through += [t for n, t in special.items() if taught[n] > (t == tokenizer.eos) and t not in through]
    if through:
        yield Finding(
            "wrong",
            f"In a task's text these speak as special tokens: {', '.join(map(repr, through))}.",
            "Look for tokens in tokenizer.json that are matched inside of words or with white space between.",
        )
    else:
        yield Finding("ok", f"{len(special)} special tokens are escaped in data.")


def context(patient: Patient) -> Iterator[Finding]:
    """Room for prompts and answers, and whether the first task's prompts find it with all their examples."""
    config, (tokenizer, whole) = patient.config, patient.reader
    limit, task = config.student.max_prompt_tokens, patient.first[0] or patient.task
    yield Finding("ok", f"The context holds {whole:,} tokens; prompts of up to {limit:,} are asked for.")
    for name, new in (("inputs", config.inputs.max_new_tokens), ("outputs", config.outputs.max_new_tokens)):
        prompts = reference.PROMPTS[config.method].within(tokenizer, limit, whole, new)
        if whole - prompts.max_tokens < new:
            yield Finding(
                "warning",
                f"{name}.max_new_tokens={new}: behind the longest prompts there is room for {whole - prompts.max_tokens}.",
                f"Lower it, or student.max_prompt_tokens to {max(16, whole - new):,}; else long texts are cut.",
            )
        if name == "inputs":
            prompt = prompts.writing(task, [e.input for e in task.examples], [], (task.labels or (None,))[0])
        else:
            prompt = prompts.answering(task, task.examples[0].input)
        if prompt.too_long:
            yield Finding(
                "wrong",
                f"{task.name}: a prompt for {name} has {len(prompt.ids):,} tokens, and there is room for "
                f"{prompts.max_tokens:,}.",
                "Raise student.max_prompt_tokens, lower the new tokens, or take a student with a longer context.",
            )
        elif prompt.examples < len(task.examples):
            yield Finding(
                "warning",
                f"{task.name}: a prompt for {name} has room for {prompt.examples} of {len(task.examples)} examples.",
                "Raise student.max_prompt_tokens, lower the new tokens, or shorten the examples.",
            )


def _prompts(patient: Patient) -> Prompts:
    return reference.PROMPTS[patient.config.method](patient.tokenizer, UNBOUNDED)


def _hf(patient: Patient) -> Any:
    """The Hugging Face tokenizer behind the student's; None of the scripted one."""
    return getattr(patient.tokenizer, "hf", None)
