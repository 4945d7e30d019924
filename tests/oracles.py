"""A naive second implementation of METHODS.md, to test the real one against.

One pair (or list) at a time, plain lists of Python floats, reply 0 the chosen one. Slow on purpose,
and written from METHODS.md alone: it shares no code with the package.
"""

# ruff: noqa: N803  (K is METHODS.md's name, and part of the interface)

import itertools
import math
import statistics
from collections.abc import Callable

Row = list[float]
Matrix = list[list[float]]


def softplus(z: float) -> float:
    """log(1 + e^z), without overflow; softplus(-z) is -log sigma(z)."""
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


def sigmoid(z: float) -> float:
    """sigma(z) = 1 / (1 + e^-z), without overflow."""
    e = math.exp(-abs(z))
    return 1.0 / (1.0 + e) if z >= 0.0 else e / (1.0 + e)


def logsumexp(values: Row) -> float:
    """log sum_i e^v_i, shifted by the maximum."""
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def log_softmax(values: Row) -> Row:
    """log softmax_i(v) = v_i - log sum_j e^v_j."""
    top = max(values)
    norm = logsumexp([v - top for v in values])
    return [(v - top) - norm for v in values]


def reply_logprob(logits_rows: Matrix, token_ids: list[int]) -> float:
    """S(y) = sum_t log pi(y_t | x, y_<t); row t holds the logits that predict token t."""
    rows = zip(logits_rows, token_ids, strict=True)
    return math.fsum(log_softmax(row)[token] for row, token in rows)


def margin(scores: Row) -> float:
    """d = l(y+) - l(y-) of one pair."""
    chosen, rejected = scores
    return chosen - rejected


def link(name: str, z: float, beta: float, eps: float = 0.0) -> float:
    """-log sigma(z) (smoothed by eps), rDPO's robust loss, IPO (z/b - 1/(2b))^2, max(0, 1 - z)."""
    right, wrong = softplus(-z), softplus(z)
    if name == "logistic":
        return (1.0 - eps) * right + eps * wrong
    if name == "robust":
        return ((1.0 - eps) * right - eps * wrong) / (1.0 - 2.0 * eps)
    if name == "ipo":
        return (z / beta - 1.0 / (2.0 * beta)) ** 2
    if name == "hinge":
        return max(0.0, 1.0 - z)
    raise ValueError(f"unknown link {name!r}")


_link = link  # the losses below have a parameter called `link`


def _present(refs: Matrix, alpha: Row) -> list[tuple[float, Row]]:
    """(alpha_k, reference k) of the references with alpha_k != 0: exactly 0 removes reference k."""
    return [(a, ref) for a, ref in zip(alpha, refs, strict=True) if a != 0.0]


def harmonic_reference(refs: Matrix, alpha: Row) -> Row:
    """L_ref(y) = -log sum_k alpha_k exp(-l_k(y)), for each reply."""
    kept = _present(refs, alpha)
    replies = range(len(refs[0]))
    return [-logsumexp([math.log(a) - ref[i] for a, ref in kept]) for i in replies]


def geometric_reference(refs: Matrix, alpha: Row) -> Row:
    """l_ref(y) = sum_k alpha_k l_k(y), for each reply."""
    kept = _present(refs, alpha)
    return [math.fsum(a * ref[i] for a, ref in kept) for i in range(len(refs[0]))]


def dpo(policy: Row, ref: Row, beta: float, *, link: str = "logistic", eps: float = 0.0) -> float:
    """DPO: z = beta (d_theta - d_ref), L = link(z)."""
    return _link(link, beta * (margin(policy) - margin(ref)), beta, eps)


def mdpo(
    policy: Row, refs: Matrix, alpha: Row, beta: float, *, link: str = "logistic", eps: float = 0.0
) -> float:
    """MDPO: z_k = beta (d_theta - d_k), L = sum_k alpha_k link(z_k)."""
    kept = _present(refs, alpha)
    return math.fsum(a * dpo(policy, ref, beta, link=link, eps=eps) for a, ref in kept)


def mrpo(
    policy: Row, refs: Matrix, alpha: Row, beta: float, *, link: str = "logistic", eps: float = 0.0
) -> float:
    """MRPO: z = beta (d_theta - (L+_ref - L-_ref)), L_ref the harmonic mean, L = link(z)."""
    return dpo(policy, harmonic_reference(refs, alpha), beta, link=link, eps=eps)


def geometric(
    policy: Row, refs: Matrix, alpha: Row, beta: float, *, link: str = "logistic", eps: float = 0.0
) -> float:
    """Geometric: z = beta (d_theta - (l+_ref - l-_ref)), l_ref = sum_k alpha_k l_k, L = link(z)."""
    return dpo(policy, geometric_reference(refs, alpha), beta, link=link, eps=eps)


def listwise_target(ratings: Matrix, lam: Row, temperature: float = 1.0) -> Row:
    """p*_i = sum_a lambda_a softmax_i(rating_i^(a) / T); ratings has one row of R per aspect a."""
    kept = [(w, log_softmax([x / temperature for x in row])) for w, row in _present(ratings, lam)]
    return [math.fsum(w * math.exp(row[i]) for w, row in kept) for i in range(len(ratings[0]))]


def listwise(
    policy: Row, refs: Matrix, alpha: Row, beta: float, target: Row, *, combine: str
) -> float:
    """L = -sum_i p*_i log softmax_i(r), r = beta (l_theta - l_ref); mdpo combines the losses."""
    if combine == "mdpo":
        kept = _present(refs, alpha)
        one = [listwise(policy, [ref], [1.0], beta, target, combine="mrpo") for _, ref in kept]
        return math.fsum(a * loss for (a, _), loss in zip(kept, one, strict=True))
    combined = {"mrpo": harmonic_reference, "geometric": geometric_reference}[combine](refs, alpha)
    rewards = [beta * (p - ref) for p, ref in zip(policy, combined, strict=True)]
    terms = zip(target, log_softmax(rewards), strict=True)
    return -math.fsum(p * logp for p, logp in terms if p != 0.0)


def ctro(refs: Matrix, anchor: int, eps: float, adaptive: bool) -> Matrix:
    """CTRO: s_k clamped to [(1 + e) s_a, (1 - e) s_a], k != a; adaptive e+ = e |b+|/(|b+|+|b-|)."""
    bounds = [eps, eps]
    if adaptive:
        b_chosen, b_rejected = (abs(statistics.fmean(column)) for column in zip(*refs, strict=True))
        total = b_chosen + b_rejected
        share = b_chosen / total if total > 0.0 else 0.5  # 0/0: every log-prob is 0, nothing moves
        bounds = [eps * share, eps - eps * share]
    clipped = [list(ref) for ref in refs]
    for k, i in itertools.product(range(len(refs)), range(2)):
        if k != anchor:
            s_a = refs[anchor][i]
            clipped[k][i] = min(max(refs[k][i], (1.0 + bounds[i]) * s_a), (1.0 - bounds[i]) * s_a)
    return clipped


def pair_weight(loss: Callable[[Row], float], policy: Row, beta: float) -> float:
    """w = |dL/d d_theta| / beta, central differences (4th order) of `loss` as d_theta moves."""
    h = 1e-3 / beta  # a step of 1e-3 in z
    at = [loss([policy[0] + step * h, policy[1]]) for step in (-2.0, -1.0, 1.0, 2.0)]
    slope = (8.0 * (at[2] - at[1]) - (at[3] - at[0])) / (12.0 * h)
    return abs(slope) / beta


def pair_weight_mdpo(policy: Row, refs: Matrix, alpha: Row, beta: float) -> float:
    """w = sum_k alpha_k sigma(-z_k), z_k = beta (d_theta - d_k): MDPO with the logistic link."""
    kept = _present(refs, alpha)
    return math.fsum(a * sigmoid(-beta * (margin(policy) - margin(ref))) for a, ref in kept)


def ess(weights: Row) -> float:
    """Effective sample size (sum w)^2 / sum w^2; nan if every w is 0."""
    squares = math.fsum(w * w for w in weights)
    return math.fsum(weights) ** 2 / squares if squares > 0.0 else math.nan


def cv(weights: Row) -> float:
    """Coefficient of variation, population standard deviation / mean (ess = n / (1 + cv^2))."""
    mean = statistics.fmean(weights)
    return statistics.pstdev(weights) / mean if mean != 0.0 else math.nan


def _normalized(values: Row) -> Row:
    """alpha_k = v_k / sum_j v_j; 0/0 gives uniform."""
    total = math.fsum(values)
    return [v / total for v in values] if total > 0.0 else uniform(len(values))


def uniform(K: int) -> Row:
    """alpha_k = 1/K."""
    return [1.0 / K] * K


def single(k: int, K: int) -> Row:
    """alpha = e_k."""
    return [1.0 if j == k else 0.0 for j in range(K)]


def fixed(values: Row, K: int | None = None) -> Row:
    """alpha = values / sum; refused if negative, not finite, all zero, or not of length K."""
    if K is not None and len(values) != K:
        raise ValueError("not of length K")
    if not all(math.isfinite(v) and v >= 0.0 for v in values) or not any(values):
        raise ValueError("weights must be finite, non-negative and not all zero")
    return _normalized(values)


def arwc(margins_row: Row) -> Row:
    """Per pair: alpha_ik = |d_ik| / sum_j |d_ij|."""
    return _normalized([abs(d) for d in margins_row])


def vdw(margins: Matrix) -> Row:
    """alpha_k prop. to sum_{i in val} |d_ik|."""
    return _normalized([math.fsum(abs(d) for d in column) for column in zip(*margins, strict=True)])


def vaw(margins: Matrix) -> Row:
    """alpha_k prop. to #{i in val : d_ik > 0}."""
    right = [sum(d > 0.0 for d in column) for column in zip(*margins, strict=True)]
    return _normalized([float(count) for count in right])


def rmc(margins: Matrix) -> Row:
    """alpha_k prop. to max(0, r_k), r_k = 2 acc_k - 1 (both times N here, to stay exact)."""
    right = [sum(d > 0.0 for d in column) for column in zip(*margins, strict=True)]
    return _normalized([float(max(0, 2 * count - len(margins))) for count in right])


def _solve(matrix: Matrix, rhs: Row) -> Row:
    """Solve a linear system by Gauss-Jordan elimination with partial pivoting."""
    rows = [[*row, value] for row, value in zip(matrix, rhs, strict=True)]
    for c in range(len(rows)):
        pivot = max(range(c, len(rows)), key=lambda r: abs(rows[r][c]))
        rows[c], rows[pivot] = rows[pivot], rows[c]
        for r in range(len(rows)):
            ratio = rows[r][c] / rows[c][c] if r != c else 0.0
            rows[r] = [x - ratio * y for x, y in zip(rows[r], rows[c], strict=True)]
    return [row[-1] / row[c] for c, row in enumerate(rows)]


def _mixed(w: Row, margins: Matrix) -> Row:
    """The mixture margin sum_k w_k d_ik of every pair; w_k of exactly 0 removes reference k."""
    pairs = ([(a, d) for a, d in zip(w, row, strict=True) if a != 0.0] for row in margins)
    return [math.fsum(a * d for a, d in pair) for pair in pairs]


def vsw_objective(w: Row, margins: Matrix) -> float:
    """mean_val -log sigma(sum_k w_k d_ik) + 1e-4 ||w||^2."""
    penalty = 1e-4 * math.fsum(x * x for x in w)
    return statistics.fmean(softplus(-z) for z in _mixed(w, margins)) + penalty


def vsw_gradient(w: Row, margins: Matrix) -> Row:
    """d/dw_k of that objective: mean_val -sigma(-sum_j w_j d_ij) d_ik + 2e-4 w_k."""
    back = [-sigmoid(-z) for z in _mixed(w, margins)]
    columns = zip(*margins, strict=True)
    means = [statistics.fmean(b * d for b, d in zip(back, c, strict=True)) for c in columns]
    return [mean + 2e-4 * x for mean, x in zip(means, w, strict=True)]


def _vsw_free(margins: Matrix) -> Row:
    """The objective's minimizer without w >= 0: Newton, step halved until the gradient shrinks."""
    n, ks = len(margins), range(len(margins[0]))
    w = [0.0 for _ in ks]
    g = vsw_gradient(w, margins)
    for _ in range(1000):
        curve = [sigmoid(z) * sigmoid(-z) / n for z in _mixed(w, margins)]
        hessian = [[2e-4 if j == k else 0.0 for k in ks] for j in ks]
        for j, k in itertools.product(ks, ks):
            hessian[j][k] += math.fsum(c * d[j] * d[k] for c, d in zip(curve, margins, strict=True))
        direction = _solve(hessian, g)
        for halvings in range(40):
            step = 0.5**halvings
            trial = [x - step * p for x, p in zip(w, direction, strict=True)]
            trial_g = vsw_gradient(trial, margins)
            if math.hypot(*trial_g) < (1.0 - 0.25 * step) * math.hypot(*g):
                break
        else:
            return w  # the gradient shrinks no more: it is at rounding level
        w, g = trial, trial_g
    return w


def vsw_solution(margins: Matrix) -> Row:
    """argmin_{w >= 0} of vsw's objective: of all supports' minimizers, the one meeting KKT best."""

    def residual(w: Row) -> float:  # 0 at the optimum: w_k = max(0, w_k - g_k)
        pairs = zip(w, vsw_gradient(w, margins), strict=True)
        return max(abs(x - max(0.0, x - g)) for x, g in pairs)

    ks = range(len(margins[0]))
    candidates = [[0.0 for _ in ks]]
    for size in range(1, len(ks) + 1):
        for support in itertools.combinations(ks, size):
            solved = _vsw_free([[row[k] for k in support] for row in margins])
            on = dict(zip(support, solved, strict=True))
            if min(solved) >= 0.0:
                candidates.append([on.get(k, 0.0) for k in ks])
    return min(candidates, key=residual)


def vsw(margins: Matrix) -> Row:
    """alpha = w / sum w, w = argmin_{w >= 0} mean -log sigma(sum_k w_k d_ik) + 1e-4 s^2 ||w||^2,
    s^2 the mean of d_ik^2: as of margins divided by s, since alpha forgets the scale of w."""
    s = math.sqrt(statistics.fmean(d * d for row in margins for d in row))
    return _normalized(vsw_solution([[d / s if s else 0.0 for d in row] for row in margins]))


def grid(margins: Matrix, m: int) -> Row:
    """Best accuracy of sum_k alpha_k d_ik over alpha = c/m; then entropy loss; then lexicographic.

    Accuracy is counted on sum_k c_k d_ik, and losses within 1e-12 tie: rounding breaks no tie.
    """
    scored: list[tuple[int, float, list[int]]] = []
    for counts in itertools.product(range(m + 1), repeat=len(margins[0])):
        if sum(counts) == m:
            mixed = _mixed([float(c) for c in counts], margins)
            loss = statistics.fmean(softplus(-z / m) for z in mixed)
            scored.append((sum(z > 0.0 for z in mixed), loss, list(counts)))
    most = max(right for right, _, _ in scored)
    least = min(loss for right, loss, _ in scored if right == most)
    tied = [c for right, loss, c in scored if right == most and loss <= least + 1e-12]
    return [c / m for c in min(tied)]


def swcw(history_of_batches: list[Matrix], window: int = 1, K: int | None = None) -> Row:
    """alpha_k prop. to sum |d_ik| over the last `window` batches; uniform(K) at t = 0."""
    if not history_of_batches:
        if K is None:
            raise ValueError("K is needed at t = 0")
        return uniform(K)
    return vdw([row for batch in history_of_batches[-window:] for row in batch])


def swcw_oh(history: list[Matrix], anchor: int, window: int = 1, K: int | None = None) -> Row:
    """One-hot of swcw's argmax (ties: lowest index); e_anchor at t = 0."""
    alpha = swcw(history, window, K)
    return single(alpha.index(max(alpha)) if history else anchor, len(alpha))


def tsw_prior(K: int, prior: float) -> tuple[Row, Row]:
    """Beta(p, p) for each of the K arms: (a, b)."""
    return [float(prior)] * K, [float(prior)] * K


def tsw_alpha(draws: Row) -> Row:
    """alpha = e_k*, k* = argmax_k theta_k of the draws theta_k ~ Beta(a_k, b_k)."""
    return single(draws.index(max(draws)), len(draws))


def tsw_update(a: Row, b: Row, arm: int, before: float, after: float) -> tuple[Row, Row]:
    """Reward 1 if after > before, else 0; a += reward and b += 1 - reward, for `arm` only."""
    new_a, new_b = list(a), list(b)
    (new_a if after > before else new_b)[arm] += 1.0
    return new_a, new_b


# Lists --------------------------------------------------------------------------------------------


def list_margin(logps: Row, p: Row) -> float:
    """The mean of l_i - l_j over pairs, weighted by |p_i - p_j|, in the direction of p."""
    pairs = list(itertools.combinations(range(len(p)), 2))
    total = math.fsum(abs(p[i] - p[j]) for i, j in pairs)
    return (
        math.fsum((p[i] - p[j]) * (logps[i] - logps[j]) for i, j in pairs) / total if total else 0
    )


def expected(metric: Callable[[list[int]], float], scores: Row) -> float:
    """The mean of a metric of an order (best first) over all orders that the scores allow."""
    orders = [
        order
        for order in map(list, itertools.permutations(range(len(scores))))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    return statistics.fmean(metric(order) for order in orders)


def dcg(order: list[int], gains: Row) -> float:
    return math.fsum(gains[i] / math.log2(place + 2) for place, i in enumerate(order))
