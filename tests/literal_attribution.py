"""attribution.py for one run, written out: every equation a row of a matrix, every block of unknowns in one system."""

import math

import numpy as np

from user_grouping_evaluation_sim import attribution, scoring


def equations(history, num_groups, measured):
    """Rows (kind, block, x, y) of one run's rounds. A past round: (labels, weights, rewards, merged or None)."""
    rows, away = [], []
    for number, (labels, weights, rewards, merged) in enumerate(history, start=1):
        middle = float(np.median(rewards))
        away += [abs(r - middle) for r in rewards]
        furthest = attribution.OUTLIER * float(np.median(away)) or math.inf
        rewards = [middle + min(max(r - middle, -furthest), furthest) for r in rewards]
        block = 0 if number <= measured else 1
        n = len(labels)
        by_group = [[weights[i] if labels[i] == g else 0.0 for i in range(n)] for g in range(num_groups)]
        mean = [sum(row[i] for row in by_group) / num_groups for i in range(n)]
        common = sum(rewards) / num_groups
        for g in range(num_groups):
            rows.append((0, block, [a - b for a, b in zip(by_group[g], mean, strict=True)], rewards[g] - common))
        if merged is not None:
            rows.append((1, block, [a - b for a, b in zip(merged[0], mean, strict=True)], merged[1] - common))
    return rows


def count(rows, kind, block, num_groups):
    """Independent equations: the groups' of a round sum to 0."""
    own = sum(row[:2] == (kind, block) for row in rows)
    return own * (num_groups - 1) // num_groups if kind == 0 else own


def first_state(rows, n, num_groups):
    squares = sum(y * y for *_, y in rows)
    independent = max(num_groups - 1, 1)
    half = (squares or 2.0) / independent / 2
    spread = half * independent / (sum(x * x for _, _, row, _ in rows for x in row) or 1.0)
    return {
        "errors": [half, half],
        "spread": spread,
        "drift": attribution.FIRST_DRIFT * spread,
        "solved": np.zeros((3 * n, 1 + attribution.PROBES)),
    }


def state_of(found, run):
    """Of one run of an attribution.Attribution."""
    solved = found.solved[:, run].reshape(-1, found.solved.shape[-1])
    return {"errors": found.errors[:, run], "spread": found.spread[run], "drift": found.drift[run], "solved": solved}


def system(rows, state, n):
    """The mixed model's equations: matrix (3n, 3n) of beta, d_0 and d_1, and right hand side."""
    matrix = np.diag(np.repeat([1 / state["spread"], 1 / state["drift"], 1 / state["drift"]], n))
    right = np.zeros(3 * n)
    for kind, block, x, y in rows:
        whole = np.zeros(3 * n)
        whole[:n] = whole[(1 + block) * n : (2 + block) * n] = x
        matrix += np.outer(whole, whole) / state["errors"][kind]
        right += whole * y / state["errors"][kind]
    return matrix, right


def step(state, rows, n, num_groups):
    """The state after another round: a few conjugate gradients, then one step of expectation maximisation."""
    state = state or first_state(rows, n, num_groups)
    probes = attribution.PROBES
    signs = np.concatenate([*attribution._signs(n, probes)[:, 0]])
    matrix, right = system(rows, state, n)
    wanted = np.column_stack([right, signs])
    solved = state["solved"].copy()
    for c in range(1 + probes):
        u = solved[:, c]
        left = wanted[:, c] - matrix @ u
        direction = left / np.diag(matrix)
        size = left @ direction
        least = attribution.CONVERGED**2 * (wanted[:, c] @ (wanted[:, c] / np.diag(matrix)))
        for _ in range(attribution.ITERATIONS):
            going = size > least
            length = size / (direction @ matrix @ direction) if going else 0.0
            u = u + length * direction
            left = left - length * (matrix @ direction)
            better = left / np.diag(matrix)
            new = left @ better
            direction = better + (new / size if going else 0.0) * direction
            size = new
        solved[:, c] = u
    u = solved[:, 0]
    traces = [max((signs * solved[:, 1:])[b * n : (b + 1) * n].sum() / probes, 0) for b in range(3)]
    mean_squares = [(u[b * n : (b + 1) * n] @ u[b * n : (b + 1) * n] + traces[b]) / n for b in range(3)]
    first = [row for row in rows if row[:2] == (0, 0)]
    shown = first if any(y for *_, y in first) else rows
    number = sum(count(shown, kind, block, num_groups) for kind in (0, 1) for block in (0, 1))
    scale = sum(y * y for *_, y in shown) / max(number, 1)
    spread = max(mean_squares[0], attribution.LEAST_SPREAD * scale) if scale else state["spread"]
    both = {block for _, block, _, _ in rows} == {0, 1}
    drift = (mean_squares[1] + mean_squares[2]) / 2 if both else attribution.FIRST_DRIFT * spread
    errors = list(state["errors"])
    for kind in (0, 1):
        total, number = 0.0, 0
        for block in (0, 1):
            own = [row for row in rows if row[:2] == (kind, block)]
            number += count(rows, kind, block, num_groups)
            spans = u.reshape(3, n)[0] + u.reshape(3, n)[1 + block]
            total += sum((y - np.dot(x, spans)) ** 2 for *_, x, y in own)
            unsure = 0.0
            for p in range(1, 1 + probes):
                z, solved_z = signs[:, p - 1].reshape(3, n), solved[:, p].reshape(3, n)
                for *_, x, _ in own:
                    unsure += np.dot(x, z[0] + z[1 + block]) * np.dot(x, solved_z[0] + solved_z[1 + block])
            total += max(unsure / probes, 0)
        if any(row[0] == kind for row in rows):
            errors[kind] = total / max(number, 1)
    return {
        "errors": [max(error, attribution.LEAST_ERROR * scale) for error in errors] if scale else state["errors"],
        "spread": spread,
        "drift": max(drift, attribution.LEAST_DRIFT * spread),
        "solved": solved,
    }


def attributed(memory, history, num_rounds, num_groups):
    """scoring.attributed for one run. memory: of the round before."""
    n = len(history[0][0])
    low, high = scoring.MEASURED_SHARE
    measured = round(num_rounds * min(high, max(low, scoring.MEASURED_EQUATIONS * n / num_groups / num_rounds)))
    state = step(memory.get("state"), equations(history, num_groups, measured), n, num_groups)
    beta, first_drift, second_drift = state["solved"][:, 0].reshape(3, n)
    paid = beta + first_drift
    merged_weights = None
    shares = beta + (first_drift if len(history) <= measured else second_drift)
    away = shares - np.median(shares)
    own = 1.4826 * np.median(np.abs(away)) or max(np.abs(away).max(), np.finfo(float).tiny)
    spread = max(own, (state["spread"] + state["drift"]) ** 0.5)
    group_weights = [1.0] * n
    if len(history) >= measured:
        leaning = [min(max(a / spread, -scoring.FURTHEST), scoring.FURTHEST) for a in away]
        group_weights = [float(np.exp(scoring.LEANING * a)) for a in leaning]
        raw = [float(np.exp(scoring.SHARPNESS * (share - max(shares)) / spread)) for share in shares]
        merged_weights = [w / sum(raw) for w in raw]
    for i, a in enumerate(away):
        if a < -scoring.HARMFUL * own:
            group_weights[i] = scoring.LEAST_WEIGHT
    return {
        "state": state,
        "points": [1 + b for b in paid.tolist()],
        "merged_weights": merged_weights,
        "group_weights": group_weights,
    }
