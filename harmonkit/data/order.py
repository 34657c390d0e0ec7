"""The order of a run: the source of each micro-batch, and the order of a source's samples in an epoch.

Both are functions of a number, so that a run resumes anywhere, on any number of processes.

Letters: S sources.
"""
from collections import Counter

import numpy as np

LONGEST_CYCLE = 10_000              # micro-batches


def source_shares(sources, ratio) -> list:
    """Each source's share of the micro-batches: its task's part of the ratio, split by weight.

    ratio: {task: part}. Raises ValueError unless its tasks are those of the sources.
    """
    weights = Counter()
    for source in sources:
        weights[source.task] += source.weight
    if set(weights) != set(ratio):
        raise ValueError(f"the recipe trains {', '.join(ratio)}; the mixture has sources for "
                         f"{', '.join(weights)}; these must be the same tasks")
    shares = [ratio[source.task] * source.weight / weights[source.task] for source in sources]
    if not 0 < sum(shares) < float("inf"):
        raise ValueError(f"the weights of the sources, {min(source.weight for source in sources):g} to "
                         f"{max(source.weight for source in sources):g}, are too small or too large to share "
                         "the micro-batches by; 1 is a usual weight")
    return shares


def source_cycle(shares) -> list:
    """The shortest cycle of source indices in which each comes as often as its share says, evenly spread.

    Empty if it has more than LONGEST_CYCLE entries.
    """
    if sum(shares) > 2 * LONGEST_CYCLE * min(shares):           # rounding takes away less than half
        return []
    # Find whole numbers in the ratio of the shares.
    for scale in range(1, 101):
        exact = [share / min(shares) * scale for share in shares]
        counts = [round(x) for x in exact]
        if all(abs(count - x) < 1e-3 * count for count, x in zip(counts, exact, strict=True)):
            break
    if sum(counts) > LONGEST_CYCLE:
        return []
    # Each step adds the counts to the credits. The largest credit is next and loses the sum of the counts.
    cycle = []
    credit = np.zeros(len(counts), dtype=int)
    for _ in range(sum(counts)):
        credit += counts
        cycle.append(int(credit.argmax()))
        credit[cycle[-1]] -= sum(counts)
    return cycle


class Order:
    """The sources of all micro-batches by number: a short cycle, or else `place_by_time`. shares: S."""

    def __init__(self, shares):
        self.shares = np.array(shares) / sum(shares)
        self.cycle = source_cycle(shares)
        self.counts = Counter()
        self.before = []                                        # of each entry: its source's entries before
        for s in self.cycle:
            self.before.append(self.counts[s])
            self.counts[s] += 1

    def place(self, number) -> tuple:
        """The index of a micro-batch's source, and how many micro-batches of that source come before."""
        if not self.cycle:
            return place_by_time(self.shares, number)
        rounds, i = divmod(number, len(self.cycle))
        s = self.cycle[i]
        return s, rounds * self.counts[s] + self.before[i]


def place_by_time(shares, number) -> tuple:
    """`Order.place` where source s comes at the times (k + 1/2) / shares[s], k = 0, 1, …, merged by time.

    shares: (S,), their sum is 1, so that about one micro-batch comes in a unit of time.
    """
    def counts_until(time):
        return np.floor(shares * time + 0.5).astype(np.int64)

    # Find the whole time until which at most `number` micro-batches come, and more until the next one. Until
    # a time t they are t, give or take half a micro-batch of each source, and less for rounding.
    slack = len(shares) + 1
    low, high = max(0, number - slack), number + slack
    while high - low > 1:
        middle = (low + high) // 2
        if counts_until(middle).sum() <= number:
            low = middle
        else:
            high = middle

    # Sort what comes in this unit of time. Neighbouring sources share equal times.
    first, last = counts_until(low), counts_until(high)
    coming = []
    for s in np.flatnonzero(last - first).tolist():
        coming += [((k + 0.5) / shares[s], s, k) for k in range(first[s], last[s])]
    _, s, k = sorted(coming)[number - int(first.sum())]
    return s, int(k)


def permutation(count, *seed):
    """The numbers below `count` in the order that a seed gives, (count,) int32."""
    return np.random.default_rng(seed).permutation(count).astype(np.int32)
