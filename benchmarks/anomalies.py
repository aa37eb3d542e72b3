"""Which rows are odd? Models of normal rows, asked about rows that are not: ROC-AUC.

    python -m benchmarks.anomalies --threads 1                      # goes on where it stopped
    python -m benchmarks.anomalies --sets wine --models MAF         # only these rows

Models learn from normal rows alone: of breast_cancer from benign tumours, of wine from two of three
cultivars, of digits from nine of ten digits (each of the ten is left out once, pixels with uniform
noise). Then they score unseen normal rows beside four kinds of odd ones: the class that was left
out; normal rows whose columns were shuffled, each for itself; normal rows pulled half way to the
mean; normal rows pushed away from it by half. An odd row should get a low log p. A second score is
how far log p is from the mean over the validation rows, either way (Nalisnick et al. 2019,
https://arxiv.org/abs/1906.02994). Flows get learning rate and weight decay by the validation loss
of short runs on the first split. Five splits of the tables, one for each digit. Writes
results/anomalies.json after every row.
"""

from __future__ import annotations

import argparse
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.residual_flows import Results
from benchmarks.tables import DECAYS, RATES, SCIKIT, Rows, budget, train
from nflib import data
from nflib.metrics import log_probs
from nflib.train import NonFiniteError

# The class that is odd, and in how many ways the normal rows are split.
SETS = {"breast_cancer": (0,) * 5, "wine": (2,) * 5, "digits": tuple(range(10))}
FOREST = "Isolation forest"
DENSITIES = ["RealNVP", "MAF"]
MODELS = [*SCIKIT, FOREST, *DENSITIES]


@cache
def prepared(name: str, number: int) -> Rows:
    """Train, valid and test rows of the normal classes, and the odd ones: split of this number."""
    parts = [data.load(name, s) for s in ("train", "valid", "test")]
    x = torch.cat([part.x.double().flatten(1) for part in parts])
    y = torch.cat([part.y for part in parts if part.y is not None])
    random = torch.Generator().manual_seed(number)
    if parts[0].levels:
        x = x + torch.rand(x.shape, generator=random).double()
    is_odd = y == SETS[name][number]
    normal, odd = x[~is_odd], x[is_odd]
    normal = normal[torch.randperm(len(normal), generator=random)]
    cuts = int(0.6 * len(normal)), int(0.8 * len(normal))
    mean, std = normal[: cuts[0]].mean(0), normal[: cuts[0]].std(0)
    normal, odd = ((rows - mean) / std for rows in (normal, odd))
    test = normal[cuts[1] :]
    mixed = torch.stack([column[torch.randperm(len(test), generator=random)] for column in test.T])
    rows = {"train": normal[: cuts[0]], "valid": normal[cuts[0] : cuts[1]], "test": test}
    rows |= {
        "left out": odd,
        "shuffled": mixed.T,
        "pulled in": 0.5 * test,
        "pushed out": 1.5 * test,
    }
    return {kind: part.float() for kind, part in rows.items()}


class Forest:
    """scikit-learn's isolation forest; its score takes the place of log p."""

    def __init__(self, x: Rows, seed: int) -> None:
        from sklearn.ensemble import IsolationForest

        self.fitted = IsolationForest(n_estimators=200, random_state=seed).fit(x["train"].numpy())

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.fitted.score_samples(x.numpy()))


def search(results: Results, name: str, model: str) -> tuple[float, float]:
    """The learning rate with the best validation loss of a short run, then the weight decay."""
    found = results.section("search", name, model)
    x = prepared(name, 0)

    def loss(lr: float, decay: float) -> float:
        key = f"lr {lr:g}, weight decay {decay:g}"
        if key not in found:
            try:
                history = train(model, x, lr, decay, 0, budget(x).search_steps)[1]
                found[key] = min(history.column("valid"))
            except NonFiniteError:
                found[key] = None  # the loss was not finite any more
            results.write()
        return float("inf") if found[key] is None else found[key]

    lr = min(RATES, key=lambda rate: loss(rate, DECAYS[0]))
    return lr, min(DECAYS, key=lambda decay: loss(lr, decay))


def fitted(results: Results, name: str, model: str, number: int) -> tuple[Any, dict[str, Any]]:
    """The model, and what is to be known of its training."""
    x = prepared(name, number)
    if model == FOREST:
        return Forest(x, number), {}
    if model in SCIKIT:
        return SCIKIT[model](x, number)
    lr, decay = search(results, name, model)
    flow, history = train(model, x, lr, decay, number, budget(x).steps)
    updates = int(history.records[-1]["step"])
    facts = {
        "lr": lr,
        "weight_decay": decay,
        "updates": updates,
        "best_update": history.best_step,
        "epochs": round(history.records[-1]["epoch"], 2),
        "stopped_improving": history.best_step < updates,
    }
    return flow.eval(), facts


def judged(model: Any, x: Rows) -> dict[str, Any]:
    """ROC-AUC of both scores for each kind of odd rows: 1 finds all, 0.5 is a coin."""
    from sklearn.metrics import roc_auc_score

    scores = {kind: log_probs(model, rows).double() for kind, rows in x.items()}
    middle, test = scores["valid"].mean(), scores.pop("test")
    found: dict[str, Any] = {"low": {}, "far from the mean": {}}
    for kind in ("left out", "shuffled", "pulled in", "pushed out"):
        log_p = torch.cat([test, scores[kind]])
        is_odd = torch.cat([torch.zeros(len(test)), torch.ones(len(scores[kind]))])
        for rule, oddness in (("low", -log_p), ("far from the mean", (log_p - middle).abs())):
            found[rule][kind] = round(float(roc_auc_score(is_odd, oddness)), 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS), metavar="SET")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS, metavar="MODEL")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=machine.ROOT / "results" / "anomalies.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    what = "ROC-AUC of two scores made of log p; of each kind as many odd rows as rows_of_data says"
    command = f"python -m benchmarks.anomalies --threads {options.threads}"
    facts = machine.facts("benchmarks.anomalies") | {"what": what, "command": command}
    results = Results(options.out, facts)
    for name in options.sets:
        x = prepared(name, 0)
        results.section("rows_of_data")[name] = {kind: len(rows) for kind, rows in x.items()}
        for model in options.models:
            runs = results.section("rows", name).setdefault(model, [])
            for number in range(len(runs), len(SETS[name])):
                begin = time.process_time()
                found, chosen = fitted(results, name, model, number)
                seconds = round(time.process_time() - begin, 2)
                row = {"split": number, "odd_class": SETS[name][number], "fit_seconds": seconds}
                runs.append({**row, **chosen, **judged(found, prepared(name, number))})
                results.write()
                print(f"{name}, {model}: {runs[-1]}", flush=True)


if __name__ == "__main__":
    main()
