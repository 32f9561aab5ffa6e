"""The vote among the sampled answers of one input (spec §1.4): who may vote, for what, and who wins."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from selfguide_ray.config import Trainset as Settings
from selfguide_ray.engine import Completion
from selfguide_ray.filters import Rules, Verdict, find_label, judge, length_bounds, noise_pattern, prefix_pattern
from selfguide_ray.metrics import f_measure, rouge_tokens
from selfguide_ray.schema import Task

MakeRules = Callable[[Task, Settings], Rules]


def candidate(completion: Completion) -> dict[str, Any]:
    """A sampled answer as `outputs` keeps it."""
    return {
        "output": completion.text.strip(),
        "logprob": completion.logprob,
        "finish_reason": completion.finish_reason,
        "probability": completion.probability,
    }


def answer_rules(task: Task, settings: Settings) -> Rules:
    """The filters' bounds for answers, from the examples' outputs."""
    shown = [example.output.strip() for example in task.examples]
    lengths = length_bounds(shown, settings.length_sigmas, settings.length_slack)
    wanted, legal = settings.length_filter.of(task.labels), [*shown, *task.labels]
    return Rules(
        lengths if wanted else None,
        noise_pattern((*settings.noise_words, *task.noise_words), legal),
        prefix_pattern(settings.prefixes, legal),
    )


def cast_vote(text: str, task: Task, rules: Rules, settings: Settings) -> str | Verdict:
    """A candidate's vote, or why it has none."""
    text = text.strip()
    verdict = judge(text, rules)
    if verdict is not None or not task.labels:
        return verdict or text
    if settings.extract_labels:
        return find_label(text, task.labels)
    return text if text in task.labels else Verdict("no_label")


class Votes(dict[str, str | Verdict]):
    """What `cast_vote` says of each answer to a task: students repeat themselves, and equal answers are judged once."""

    def __init__(self, task: Task, settings: Settings, make_rules: MakeRules = answer_rules) -> None:
        self.task, self.settings, self.rules = task, settings, make_rules(task, settings)

    def __missing__(self, text: str) -> str | Verdict:
        vote = self[text] = cast_vote(text, self.task, self.rules, self.settings)
        return vote


def elect(
    task: Task, candidates: list[dict[str, Any]], settings: Settings, votes: Votes | None = None
) -> tuple[str | None, dict[str, Any]]:
    """The answer that wins the vote, and the columns that tell how; None and a drop reason if none does.

    The `keep` likeliest candidates pass the filters and vote (statements 13-16): most votes, then shortest, then first.
    By consensus an answer's share is its mean ROUGE-L with the others; a lone one has all. `votes` are the task's.
    """
    votes = Votes(task, settings) if votes is None else votes
    voting = likeliest(candidates, settings)
    verdicts: list[str | None] = ["not_kept"] * len(candidates)
    ballots: list[str] = []
    weights: dict[str, float] = {}
    for index in sorted(voting):
        vote = votes[candidates[index]["output"]]
        if isinstance(vote, Verdict):
            verdicts[index] = vote.drop_reason
        else:
            verdicts[index] = None
            ballots.append(vote)
            weights[vote] = weights.get(vote, 0) + _weight(candidates[index], settings)
    told: dict[str, Any] = {"verdicts": verdicts, "voters": len(ballots), "votes": 0}
    if not ballots:
        # Nobody votes: the commonest reason among the candidates is the row's.
        reasons = Counter(verdict for verdict in verdicts if verdict != "not_kept")
        return None, told | vars(Verdict(reasons.most_common(1)[0][0] or "empty", 0.0, "at least 1 vote"))
    if settings.vote == "consensus" and not task.labels:
        shares = consensus(ballots)
    else:
        among = (
            weights.values()
            if settings.vote_among == "survivors"
            else (_weight(candidates[i], settings) for i in voting)
        )
        whole = sum(among)
        shares = {text: weight / whole if whole else 0.0 for text, weight in weights.items()}
    winner = min(shares, key=lambda text: (-shares[text], len(text)))  # of equals the first that was cast
    told["votes"] = ballots.count(winner)
    share = shares[winner]
    if share < settings.min_frequency:
        return None, told | vars(Verdict("no_majority", share, f"at least {settings.min_frequency:g} of the votes"))
    return winner, told


def _weight(candidate: dict[str, Any], settings: Settings) -> float:
    """What a candidate's vote weighs; 1 where the student was not held to labels."""
    if settings.vote_weight == "one" or candidate["probability"] is None:
        return 1
    return candidate["probability"]


def consensus(ballots: list[str]) -> dict[str, float]:
    """Each text's mean ROUGE-L with the other ballots, 0-1: the answer with the least expected loss under the samples."""
    words = [rouge_tokens(text) for text in ballots]
    shares: dict[str, float] = {}
    for at, text in enumerate(ballots):
        if text not in shares:
            others = [
                1.0 if other == text else f_measure(words[at], words[i]) for i, other in enumerate(ballots) if i != at
            ]
            shares[text] = sum(others) / len(others) if others else 1.0
    return shares


def likeliest(candidates: list[dict[str, Any]], settings: Settings) -> list[int]:
    """Places of the candidates that may vote, those with the highest summed log-probability first."""
    improbable = [-candidate["logprob"] for candidate in candidates]
    return sorted(range(len(candidates)), key=improbable.__getitem__)[: settings.keep]  # of equals the first
