"""Why does inflation help, and why with weak views? Computed, not trained, on points in a plane.

    python assets/theory.py [--draws 30] [--out assets/theory.png]        # a minute on two cores

The spectral contrastive loss (HaoChen, Wei, Gaidon, Ma 2021, Section 3)
    L(f) = -2 E[f(x)' f(x+)] + E[(f(x)' f(x'))^2],   x, x+ a positive pair, x' independent of x,
is least for k eigenvectors of the augmentation graph, whose edges are P(x, x+), the probability of
a pair. Inflation adds vertices, augmentation widens edges, and the weight N weighs real vertices.
The paper's Theorem 4.1 bounds the error of a linear probe by two numbers of this graph:
    alpha         the share of positive pairs whose points differ in class: small is good;
    lambda_{k+1}  1 - the (k+1)-th eigenvalue, 0 if the graph has more than k pieces: large is good.
Strong views raise both. More points raise lambda where views are weak and alpha is still small.

Not claimed: that images are like spirals, or that the best strength has the least alpha / lambda.
A graph of more than k pieces has many minimisers: its error tells that it is poor, not how poor."""

import argparse
from math import cos, pi, sin
from multiprocessing.pool import ThreadPool

import matplotlib.pyplot as plt
import torch

CLASSES = 4
FEATURES = 12  # k: more than classes, as an arm may fall into several pieces of the graph
STRENGTHS = [0.07, 0.1, 0.14, 0.2, 0.28, 0.4]
WEAK, STRONG = 1, 3  # as places in STRENGTHS
RATIOS = [1, 3, 10, 30, 100, 300]  # N, the weight of a real point
MIXTURES = {  # real points, generated points, their fault, the share that has it
    "60 real": (60, 0, "smear", 0),
    "600 real": (600, 0, "smear", 0),
    "+ 600 perfect": (60, 600, "smear", 0),
    "+ 600, 15 % faults": (60, 600, "smear", 0.15),
    "+ 600, 30 % faults": (60, 600, "smear", 0.3),
    "+ 600, 60 % faults": (60, 600, "smear", 0.6),
    "half mixed": (60, 600, "mix", 0.5),
    "half shifted": (60, 600, "shift", 0.5),
    "half noise": (60, 600, "noise", 0.5),
}


def spiral_arms(classes):
    """Points on four arms: both ends of an arm are one class, neighbouring arms are not."""
    position = torch.rand(len(classes))
    radius = 0.25 + 0.75 * position
    angle = 2 * pi * classes / CLASSES + 2.6 * position
    arm = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return arm + 0.06 * torch.randn(arm.shape)


def draw_world(seed):
    """All that is random. Every mixture of a draw shares it, so that differences are paired."""
    torch.manual_seed(seed)
    labels = torch.arange(600) % CLASSES
    real = spiral_arms(labels)
    world = {"test": (500, spiral_arms(labels[:500]), labels[:500])}
    classes = torch.randint(CLASSES, (600,))
    perfect = spiral_arms(classes)
    faults = {
        "mix": (perfect + perfect[torch.randperm(600)]) / 2,
        "smear": perfect + 0.25 * torch.randn(600, 2),
        "shift": perfect @ torch.tensor([[cos(0.5), sin(0.5)], [-sin(0.5), cos(0.5)]]),
        "noise": 2.2 * torch.rand(600, 2) - 1.1,
    }
    luck = torch.rand(600, 1)  # the same points fail first in every mixture
    for mixture, (n, m, fault, share) in MIXTURES.items():
        generated = torch.where(luck < share, faults[fault], perfect)
        points = torch.cat([real[:n], generated[:m]])
        world[mixture] = n, points, torch.cat([labels[:n], classes[:m]])
    return world


def mixture_weights(n, m, ratio):
    """P_t = beta P_d + (1 - beta) P_g with beta = N n / (N n + m) (the paper, Theorem 3.1)."""
    weights = torch.cat([ratio * torch.ones(n), torch.ones(m)])
    return weights / weights.sum()


def shared_views(points, others, strength):
    """Views lie anywhere within `strength` of a point: two points share the discs' overlap."""
    distance = torch.cdist(points, others, compute_mode="donot_use_mm_for_euclid_dist")
    apart = (distance / (2 * strength)).clamp(max=1)
    return 2 / pi * (apart.acos() - apart * (1 - apart ** 2).sqrt())


def positive_pairs(points, weights, strength):
    """P(x, x+), by the views that two points share. A point shares all of them with itself."""
    edges = weights[:, None] * weights * shared_views(points, points, strength)
    return edges / edges.sum()


def best_features(pairs, k):
    """The minimiser of L(f), its eigenvalues, and lambda_{k+1}.

    Let A = P(x, x+) / sqrt(P(x) P(x+)), and let F have the rows sqrt(P(x)) f(x). Then
    L(f) = |A - F F'|^2 - |A|^2, and by Eckart-Young F F' keeps A's largest eigenvalues."""
    marginal = pairs.sum(1)
    adjacency = pairs / (marginal[:, None] * marginal).sqrt()
    eigenvalues, vectors = torch.linalg.eigh(adjacency)
    features = vectors[:, -k:] * eigenvalues[-k:].sqrt() / marginal[:, None].sqrt()
    return features, eigenvalues[-k:], (1 - eigenvalues[-k - 1]).clamp(min=0)


def extend(shared, weights, features, eigenvalues):
    """Features of new points (Nystroem): at the minimum, f(x) = E[f(x+) | x] / eigenvalue."""
    partners = shared * weights
    total = partners.sum(1, keepdim=True).clamp(min=1e-30)  # a point without partners: f(x) = 0
    return partners / total @ features / eigenvalues


def measure(world, mixture, strength, ratio):
    """Test error in % of a linear probe on the real points, alpha, and lambda_{k+1}."""
    n, points, classes = world[mixture]
    weights = mixture_weights(n, len(points) - n, ratio)
    pairs = positive_pairs(points, weights, strength)
    alpha = pairs[classes[:, None] != classes].sum()
    features, eigenvalues, connectivity = best_features(pairs, FEATURES)
    # Ridge regression. A probe may scale features: each gets mean square 1 over the mixture.
    known = features[:n] / eigenvalues.sqrt()
    gram = known.T @ known + 1e-3 * torch.eye(FEATURES)
    probe = torch.linalg.solve(gram, known.T @ torch.eye(CLASSES)[classes[:n]])
    _, test, labels = world["test"]
    new = extend(shared_views(test, points, strength), weights, features, eigenvalues)
    wrong = (new / eigenvalues.sqrt() @ probe).argmax(1) != labels
    return 100 * wrong.float().mean(), alpha, connectivity


def measure_all(mixtures, strengths, ratios, seeds):
    """Errors, alphas, lambdas: {mixture: a row for each strength or N, a column for each draw}."""
    def one_draw(world):
        return [[measure(world, mixture, strength, ratio) for strength in strengths
                 for ratio in ratios] for mixture in mixtures]

    with ThreadPool(initializer=torch.set_num_threads, initargs=(1,)) as pool:  # a core for a draw
        draws = pool.map(one_draw, list(map(draw_world, seeds)), chunksize=1)
    return [dict(zip(mixtures, values)) for values in torch.tensor(draws).permute(3, 1, 2, 0)]


def mean_and_error(values):
    return values.mean(-1), values.std(-1) / values.shape[-1] ** 0.5


def plot(errors, alphas, lambdas, path):
    plt.rc("font", size=18)
    plt.rc("axes.formatter", min_exponent=3)  # 0.01, not a power of ten
    plt.rc("lines", linewidth=3, markersize=12, markerfacecolor="red")
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6.2), layout="constrained")
    x = [str(strength) for strength in STRENGTHS]
    colours = ["#666666", "#222222", "#1f6fb2", "#eeb064", "#d9822b", "#94500f"]
    for mixture, colour in zip(errors, colours):
        mean, error = mean_and_error(errors[mixture])
        style = {"color": colour, "markevery": [mean.argmin()]}  # a dot where the error is least
        left.plot(x, mean, "-o", label=mixture, **style)
        left.fill_between(x, mean - error, mean + error, color=colour, alpha=0.2)
        if mixture in alphas:
            right.plot(x, lambdas[mixture].mean(1), "-o", **style)
            right.plot(x, alphas[mixture].mean(1), "--o", **style)
    left.set(yscale="log", ylim=(0.08, 110), title="Test error, % (red: least)")
    right.set_yscale("symlog", linthresh=0.01)
    right.set(ylim=(-0.001, 1.1), title=r"Why: $\lambda_{k+1}$ (solid), $\alpha$ (dashed)")
    figure.supxlabel("strength of augmentation")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--draws", type=int, default=30)
    parser.add_argument("--out", default="assets/theory.png")
    options = parser.parse_args()
    names, seeds = list(MIXTURES), range(options.draws)
    errors, alphas, lambdas = measure_all(names[:6], STRENGTHS, [1], seeds)
    by_ratio = measure_all(names[6:], [STRENGTHS[WEAK]], RATIOS, seeds)[0]
    by_ratio["mean of the three"] = three = sum(by_ratio.values()) / 3
    alphas = {name: alphas[name] for name in names[:3]}  # a faulty point has no class
    for title, columns, rows, digits in [("error in %, s =", STRENGTHS, errors, 1),
                                         ("error in %, N =", RATIOS, by_ratio, 1),
                                         ("alpha, s =", STRENGTHS, alphas, 4),
                                         ("lambda, s =", STRENGTHS, lambdas, 4)]:
        print(f"\n{title:20}", *(f"{column:>15}" for column in columns))
        for name, values in rows.items():
            cells = [f"{m:.{digits}f} ± {e:.{digits}f}" for m, e in zip(*mean_and_error(values))]
            print(f"{name:20}", *(f"{cell:>15}" for cell in cells))
    print(f"\nThe paper's claims, as gains paired over {options.draws} draws (± standard error)")
    alone, more, perfect, few, _, many = errors.values()
    for claim, gains in {
        "1. 60 real: strong beats weak": alone[WEAK] - alone[STRONG],
        "1. 600 real: weak beats strong": more[STRONG] - more[WEAK],
        "1. + 600 perfect: weak beats strong": perfect[STRONG] - perfect[WEAK],
        **{f"2. strong, {name}: harm": errors[name][STRONG] - alone[STRONG] for name in names[2:6]},
        "3. perfect, weak: beat 60 real, strong": alone[STRONG] - perfect[WEAK],
        "3. 15 % faults, 0.14: beat it, too": alone[STRONG] - few[WEAK + 1],
        "3. 60 % faults, weak: too poor, lose": many[WEAK] - alone[STRONG],
        "4. half faulty, weak: N = 10 beats 1": three[0] - three[2],
        "4. half faulty, weak: N = 10 beats 300": three[5] - three[2],
    }.items():
        gain, error = mean_and_error(gains)
        verdict = "holds" if gain > 2 * error else "does not" if gain < -2 * error else "open"
        print(f"{claim:40}{gain:6.1f} ± {error:.1f}  {verdict}")
    plot(errors, alphas, lambdas, options.out)
