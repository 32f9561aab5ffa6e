"""One task with transformers' Trainer and peft in a process of its own: python training_peer.py JOB.json.

JOB holds model, rows (JSON lines of prompt and completion), folder (for the adapter), batch_size, epochs, learning_rate,
rank, alpha and seed. The last line printed says the loss. It does no more than it must: nothing is logged, evaluated or
kept on the way. Nothing of this project is imported.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

IGNORED = -100


def main(job: dict[str, Any]) -> None:
    """Train and save one adapter."""
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    lora = LoraConfig(r=job["rank"], lora_alpha=job["alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    rows = [json.loads(line) for line in Path(job["rows"]).read_text().splitlines()]
    pairs = [[tokenizer.encode(row[key], add_special_tokens=False) for key in ("prompt", "completion")] for row in rows]

    def collate(pairs: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(prompt) + len(answer) for prompt, answer in pairs)
        empty = [width - len(prompt) - len(answer) for prompt, answer in pairs]
        both = list(zip(pairs, empty, strict=True))
        return {
            "input_ids": torch.tensor([prompt + answer + [0] * n for (prompt, answer), n in both]),
            "attention_mask": torch.tensor([[1] * (width - n) + [0] * n for _, n in both]),
            "labels": torch.tensor([[IGNORED] * len(prompt) + answer + [IGNORED] * n for (prompt, answer), n in both]),
        }

    arguments = TrainingArguments(
        output_dir=job["folder"], per_device_train_batch_size=job["batch_size"], num_train_epochs=job["epochs"],
        learning_rate=job["learning_rate"], seed=job["seed"], optim="adamw_torch_fused", lr_scheduler_type="linear",
        weight_decay=0.0, max_grad_norm=1.0, use_cpu=True, dataloader_pin_memory=False, remove_unused_columns=False,
        report_to="none", save_strategy="no", logging_strategy="no", eval_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    outcome = Trainer(model, arguments, train_dataset=pairs, data_collator=collate).train()
    model.save_pretrained(job["folder"])
    print(json.dumps({"loss": outcome.training_loss}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
