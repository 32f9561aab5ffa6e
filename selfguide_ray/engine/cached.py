"""The engine's way with models that do not take our attention: batches over transformers' own cache.

A prefix is computed once for a batch and its keys and values are copied to all rows, which then decode until the last
has ended. Slower than `batching`, and the same in what comes out.
"""

import time
from collections.abc import Sequence

import torch
from transformers import DynamicCache

from selfguide_ray.engine import Counters
from selfguide_ray.engine.batching import Bounds, Leave
from selfguide_ray.engine.rows import Advance, Entry, Row, next_tokens, score_labels

COMPACT = 0.75  # a batch is compacted when no more than this share of its rows is still going


class CachedBatches:
    """As `batching.Batch`; each step is a whole batch of rows, from their prompts to their ends."""

    def __init__(
        self, model: torch.nn.Module, bounds: Bounds, counters: Counters, advance: Advance, leave: Leave
    ) -> None:
        self.model, self.bounds, self.counters = model, bounds, counters
        self.advance, self.leave = advance, leave
        self.device = next(model.parameters()).device
        self.waiting: list[Entry] = []

    @property
    def idle(self) -> bool:
        """Nothing waiting."""
        return not self.waiting

    def add(self, rows: Sequence[Row]) -> None:
        """Let the samples of a request wait, one by one."""
        self.waiting += [Entry([row]) for row in rows]

    def sort(self) -> None:
        """By prefix, then by length."""
        self.waiting.sort(key=lambda entry: (entry.scored is not None, entry.key, len(entry.own)))

    @torch.inference_mode()
    def step(self) -> None:
        """Take as many entries as rows and memory allow, and bring them to their ends."""
        taken: list[Entry] = []
        longest = 0
        while self.waiting and len(taken) < self.bounds.rows:
            entry = self.waiting[0]
            if taken and bool(entry.scored) != bool(taken[0].scored):
                break
            need = entry.rows[0].prompt_tokens + max(entry.params.max_new_tokens, len(entry.columns) - len(entry.own))
            if (len(taken) + 1) * max(longest, need) > self.bounds.tokens:
                if taken:
                    break
                entry.rows[0].finish_reason = "too_long"
                self.leave(self.waiting.pop(0).rows[0])
                continue
            longest = max(longest, need)
            taken.append(self.waiting.pop(0))
        rows = [entry.rows[0] for entry in taken]
        for row in rows:
            row.began = time.monotonic()
        if rows and taken[0].scored:
            self._score(taken)
        elif rows:
            self._decode(rows)
        for row in rows:
            self.leave(row)

    def _score(self, entries: list[Entry]) -> None:
        """Score the labels of each entry, one after another: a row for each label."""
        for entry in entries:
            tree, row = entry.scored, entry.rows[0]
            assert tree is not None
            most = max(map(len, tree.labels))
            _, _, logits = self._prefill(
                [(row.request.prefix, (*entry.own, *label[:-1])) for label in tree.labels], keep=most
            )
            behind = logits.new_zeros(len(tree.children), logits.shape[-1])
            for label, path, line in zip(tree.labels, tree.paths, logits, strict=True):
                behind[path] = line[most - len(label) :]
            score_labels([row], tree, behind, self.advance)

    def _decode(self, rows: list[Row]) -> None:
        """Prefill the rows and decode until all have ended."""
        cache, mask, logits = self._prefill([(row.request.prefix, row.request.suffix) for row in rows])
        logits = logits[:, -1]
        seen: set[tuple[int, ...]] = set()
        for row in rows:
            row.cached = len(row.request.prefix) if row.request.prefix in seen else 0
            seen.add(row.request.prefix)
        positions = torch.tensor([row.prompt_tokens for row in rows], device=self.device)
        going = list(rows)
        while True:
            at_work = [i for i, row in enumerate(going) if not row.finish_reason]
            next_tokens([going[i] for i in at_work], logits[at_work], self.advance)
            self.counters.steps += 1
            self.counters.rows += len(at_work)
            self.counters.places += self.bounds.rows
            alive = [i for i, row in enumerate(going) if not row.finish_reason]
            if not alive:
                return
            if len(alive) <= COMPACT * len(going):
                keep = torch.tensor(alive, device=self.device)
                cache.batch_select_indices(keep)
                mask, positions = mask[keep], positions[keep]
                going = [going[i] for i in alive]
            mask = torch.cat([mask, mask.new_ones(len(going), 1)], dim=1)
            logits = self.model(
                input_ids=torch.tensor([[row.ids[-1] if row.ids else 0] for row in going], device=self.device),
                attention_mask=mask,
                position_ids=positions[:, None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            positions = positions + 1

    def _prefill(
        self, prompts: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], keep: int = 1
    ) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
        """Keys and values of prompts [rows, longest], the mask of real tokens, and the logits of their last tokens.

        A row is laid out as prefix, room, suffix: suffixes end in the same column, positions count real tokens only.
        """
        prefixes = {prefix: self._prefix(prefix) for prefix in dict.fromkeys(p for p, _ in prompts) if prefix}
        widest = max(len(prefix) for prefix, _ in prompts)
        longest = max(len(suffix) for _, suffix in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), widest + longest, dtype=torch.long)
        places = torch.zeros(len(prompts), longest, dtype=torch.long)
        for i, (prefix, suffix) in enumerate(prompts):
            room = longest - len(suffix)
            ids[i, room:] = torch.tensor(suffix)
            mask[i, : len(prefix)] = 1
            mask[i, widest + room :] = 1
            places[i, room:] = len(prefix) + torch.arange(len(suffix))
        cache = DynamicCache()
        for layer in range(len(next(iter(prefixes.values()), []))):
            sides = []
            for side in (0, 1):
                example = next(iter(prefixes.values()))[layer][side]
                block = example.new_zeros(len(prompts), example.shape[1], widest, example.shape[3])
                for i, (prefix, _) in enumerate(prompts):
                    if prefix:
                        block[i, :, : len(prefix)] = prefixes[prefix][layer][side][0]
                sides.append(block)
            cache.update(sides[0], sides[1], layer)
        output = self.model(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=places.to(self.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        return cache, mask.to(self.device), output.logits

    def _prefix(self, prefix: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values [1, heads, tokens, width] of each layer."""
        cache = DynamicCache()
        self.model(
            input_ids=torch.tensor([prefix], device=self.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return [(layer.keys, layer.values) for layer in cache.layers]
