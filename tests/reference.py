"""Plain implementations that tests compare the package with.

numpy in float64, one token, one loop and one head at a time; nothing is shared with the package
but the names of the weights.
"""

from dataclasses import dataclass, field

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.logaddexp(0, x)


def rms_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x * x) + eps) * scale


def rotate(x, position, base, pairing):
    """Turn channel i and its partner by position * base^(-2i/d)."""
    out, half = np.empty_like(x), len(x) // 2
    for i in range(half):
        first, second = (i, i + half) if pairing == "half" else (2 * i, 2 * i + 1)
        angle = position * base ** (-2 * i / len(x))
        cos, sin = np.cos(angle), np.sin(angle)
        out[first] = x[first] * cos - x[second] * sin
        out[second] = x[second] * cos + x[first] * sin
    return out


def attend(query, keys, values, scale):
    """Softmax attention of one head's query over lists of keys and values."""
    scores = np.array([scale * (query @ key) for key in keys])
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


def activate(x, kind):
    if kind == "relu2":
        return np.maximum(x, 0) ** 2
    gate, up = np.split(x, 2)
    return gate * sigmoid(gate) * up


@dataclass
class Result:
    logits: np.ndarray
    """(batch, sequence, vocab)"""
    loops: np.ndarray
    """(batch, sequence)"""
    states: np.ndarray
    """(loops, batch, sequence, hidden): a token that has left keeps its last."""
    routing: dict = field(default_factory=dict)
    """(batch, place, loop, layer) to the experts chosen, best first."""
    margin: float = np.inf
    """Smallest gap between an expert chosen and one left out."""
    rules: list = field(default_factory=list)
    """Each token's rule, sequence by sequence."""


class Reference:
    """One model's weights, and the forward pass token by token, loop by loop."""

    def __init__(self, model):
        self.config = model.config
        self.weights = {n: t.detach().double().numpy() for n, t in model.state_dict().items()}

    def __call__(self, token_ids, loops, *, rule=None, h0=None):
        """`loops` is (batch, sequence); `rule` makes one token's rule from this, or is None."""
        token_ids, loops = np.asarray(token_ids), np.asarray(loops)
        result = Result(None, loops.copy(), None)
        self.result, logits, states = result, [], []
        for b in range(len(token_ids)):
            self.sequence = b
            first = None if h0 is None else np.asarray(h0[b], dtype=np.float64)
            out = self.one_sequence(token_ids[b], loops[b], rule, first)
            logits.append(out[0])
            states.append(out[1])
        result.logits = np.stack(logits)
        deepest = max(len(s) for s in states)
        states = [s + s[-1:] * (deepest - len(s)) for s in states]
        result.states = np.stack(states, 1)
        return result

    def one_sequence(self, ids, budget, rule, h0):
        x = [self.weights["embed.weight"][token] * self.config.embedding_scale for token in ids]
        for number in range(self.config.prelude_layers):
            x = self.outer_layer(f"prelude.{number}", x)
        e = [self.norm(v, "prelude_norm") if self.config.prelude_norm else v for v in x]
        first = e if self.config.h0 == "e" else [np.zeros_like(v) for v in e]
        rules = [rule(self) if rule else None for _ in ids]
        self.result.rules.extend(one for one in rules if one)
        h, states = self.core(e, first if h0 is None else h0, budget, rules)
        h = [v if one is None else one.output(v) for v, one in zip(h, rules, strict=True)]
        y = [self.core_output(v) for v in h]
        for number in range(self.config.coda_layers):
            y = self.outer_layer(f"coda.{number}", y)
        return np.stack([self.readout(v) for v in y]), states

    def core(self, e, h, budget, rules):
        """Return each token's state where it left, and all states after every loop."""
        h, left, entries, states = list(h), {}, {}, []  # left: each token's last loop
        for loop in range(max(budget)):
            active = [p for p in range(len(e)) if p not in left]
            if not active:
                break
            u = {p: self.inject(h[p], e[p]) for p in active}
            for number in range(self.config.core_layers):
                name = f"core.layers.{number}"
                for p in active:  # every key of this loop, before any is read
                    entries[number, loop, p] = self.entry(name, u[p], p, loop)
                for p in active:
                    seen = [entries[number, min(loop, left.get(q, loop)), q] for q in range(p + 1)]
                    u[p] = self.layer(name, u[p], p, loop, seen, number)
            for p in active:
                after = self.norm(u[p], "core.norm") if self.config.loop_norm else u[p]
                last = loop + 1 == budget[p]
                # A rule that fires lets its token run one loop more.
                if last or (rules[p] is not None and rules[p].fired):
                    left[p] = loop
                if rules[p] is not None:
                    rules[p].look(h[p], after, last)
                h[p] = after
            states.append(np.stack(h))
        self.result.loops[self.sequence] = [left[p] + 1 for p in range(len(e))]
        return h, states

    def core_output(self, h):
        if self.config.core_output == "linear":
            return self.weights["core_output.weight"] @ h
        return self.norm(h, "core_output") if self.config.core_output == "norm" else h

    def readout(self, y):
        y = self.norm(y, "norm") if self.config.final_norm else y
        return self.weights["head.weight"] @ y * self.config.logit_scale

    def norm(self, x, name):
        return rms_norm(x, self.weights[f"{name}.weight"], self.config.norm_eps)

    def inject(self, h, e):
        kind, w = self.config.injection, self.weights
        if kind == "lti":
            step = softplus(w["core.injection.decay.step"])
            a = np.exp(-(2.0**-8 + step * softplus(w["core.injection.decay.rate"])))
            return a * h + 8 * np.tanh(step / 8) * (w["core.injection.weight"] @ e)
        if kind == "free":
            return w["core.injection.diagonal"] * h + w["core.injection.weight"] @ e
        if kind == "linear":
            return w["core.injection.weight"] @ np.concatenate([h, e])
        return h + e if kind == "add" else h

    def outer_layer(self, name, x):
        entries = [self.entry(name, v, p, 0) for p, v in enumerate(x)]
        return [self.layer(name, v, p, 0, entries[: p + 1]) for p, v in enumerate(x)]

    def layer(self, name, h, place, loop, seen, number=None):
        attention, feed_forward = self.query, self.feed_forward
        if number is not None and self.config.experts:
            feed_forward = self.experts
        h = self.residual(name, "attention", h, lambda x: attention(name, x, place, loop, seen))
        return self.residual(
            name, "feed_forward", h, lambda x: feed_forward(name, x, place, loop, number)
        )

    def residual(self, name, part, h, function):
        y = function(self.norm(h, f"{name}.{part}_norm"))
        if self.config.norm == "pre":
            return h + y
        if self.config.norm == "peri":
            return h + self.norm(y, f"{name}.{part}_out_norm")
        return self.norm(h + y, f"{name}.{part}_out_norm")

    def linear(self, name, x, loop):
        """A map, with its loop's LoRA where it has one; past the last, the last."""
        y = self.weights[f"{name}.weight"] @ x
        if f"{name}.lora.up" in self.weights:
            up, down = self.weights[f"{name}.lora.up"], self.weights[f"{name}.lora.down"]
            at = min(loop, len(up) - 1)
            y = y + up[at] @ (down[at] @ x)
        return y

    def turn(self, x, place):
        return rotate(x, place, self.config.rope_base, self.config.rope_pairing)

    def entry(self, name, h, place, loop):
        """What a token leaves for later ones to see: keys and values, or latent and rotated key."""
        x = self.norm(h, f"{name}.attention_norm")
        return (self.entry_gqa if self.config.attention == "gqa" else self.entry_mla)(
            f"{name}.attention", x, place, loop
        )

    def query(self, name, x, place, loop, seen):
        attention = self.query_gqa if self.config.attention == "gqa" else self.query_mla
        return self.linear(
            f"{name}.attention.out", attention(f"{name}.attention", x, place, loop, seen), loop
        )

    def head_gqa(self, name, qkv, head, place):
        """Head `head` of the fused product, queries before keys: biased, normed, turned."""
        c, width = self.config, self.config.head_dim
        x = qkv[head * width : (head + 1) * width]
        if c.qk_bias:
            x = x + self.weights[f"{name}.qk_bias"][head]
        if c.qk_norm:
            x = rms_norm(x, self.weights[f"{name}.qk_scale"][head], c.norm_eps)
        return self.turn(x, place)

    def entry_gqa(self, name, x, place, loop):
        c = self.config
        qkv = self.linear(f"{name}.qkv", x, loop)
        keys = [self.head_gqa(name, qkv, c.num_heads + g, place) for g in range(c.kv_heads)]
        values = qkv[(c.num_heads + c.kv_heads) * c.head_dim :].reshape(c.kv_heads, c.head_dim)
        return keys, values

    def query_gqa(self, name, x, place, loop, seen):
        c, out = self.config, []
        qkv = self.linear(f"{name}.qkv", x, loop)
        for head in range(c.num_heads):
            group = head // (c.num_heads // c.kv_heads)
            keys, values = zip(*[(k[group], v[group]) for k, v in seen], strict=True)
            query = self.head_gqa(name, qkv, head, place)
            out.append(attend(query, keys, values, c.head_dim**-0.5))
        return np.concatenate(out)

    def entry_mla(self, name, x, place, loop):
        c = self.config
        both = self.linear(f"{name}.kv_down", x, loop)
        latent, key = both[: c.kv_latent], both[c.kv_latent :]
        if c.qk_norm:
            key = rms_norm(key, self.weights[f"{name}.k_scale"], c.norm_eps)
        return self.norm(latent, f"{name}.kv_norm"), self.turn(key, place)

    def query_mla(self, name, x, place, loop, seen):
        c, out = self.config, []
        if c.q_latent:
            x = self.norm(self.linear(f"{name}.q_down", x, loop), f"{name}.q_norm")
        queries = self.linear(f"{name}.q_up", x, loop).reshape(c.num_heads, -1)
        up = self.weights[f"{name}.kv_up.weight"].reshape(c.num_heads, -1, c.kv_latent)
        for head, query in enumerate(queries):
            if c.qk_norm:
                query = rms_norm(query, self.weights[f"{name}.q_scale"][head], c.norm_eps)
            query = np.concatenate([query[: c.nope_dim], self.turn(query[c.nope_dim :], place)])
            to_key, to_value = up[head, : c.nope_dim], up[head, c.nope_dim :]
            keys = [np.concatenate([to_key @ latent, key]) for latent, key in seen]
            values = [to_value @ latent for latent, _ in seen]
            out.append(attend(query, keys, values, (c.nope_dim + c.rope_dim) ** -0.5))
        return np.concatenate(out)

    def feed_forward(self, name, x, place, loop, number, part="feed_forward"):
        inner = activate(self.linear(f"{name}.{part}.w_in", x, loop), self.config.feed_forward)
        return self.linear(f"{name}.{part}.w_out", inner, loop)

    def experts(self, name, x, place, loop, number):
        c, w, name = self.config, self.weights, f"{name}.feed_forward"
        router = w[f"{name}.router.weight"]
        router = router[min(loop, len(router) - 1)] if router.ndim == 3 else router
        affinity = sigmoid(router @ x)
        score = affinity + w[f"{name}.router.balance"] * c.balance_rate
        order = np.argsort(-score, kind="stable")
        chosen = order[: c.experts_per_token]
        if c.experts_per_token < c.experts:
            gap = score[chosen[-1]] - score[order[c.experts_per_token]]
            self.result.margin = min(self.result.margin, gap)
        self.result.routing[self.sequence, place, loop, number] = chosen.tolist()
        y = np.zeros_like(x)
        for expert in chosen:
            inner = activate(x @ w[f"{name}.w_in"][expert], c.feed_forward)
            weight = affinity[expert] / affinity[chosen].sum()
            y += c.routed_scale * weight * (inner @ w[f"{name}.w_out"][expert])
        if c.shared_experts:
            y += self.feed_forward(name, x, place, loop, number, part="shared")
        return y


def exit_probability(reference, which, before, after):
    """Of the state's direction and the logarithm of how far the last loop moved it.

    Logistic regression on what some hidden units make of them, or on them alone.
    """
    weight, bias = (reference.weights[f"core.{which}.{part}"] for part in ("weight", "bias"))
    length = np.sqrt((after**2).sum()) + 1e-8
    moved = np.sqrt(((after - before) ** 2).sum()) / length
    x = np.append(after / length * np.sqrt(len(after)), np.log(moved + 1e-6))
    if f"core.{which}.w_in" in reference.weights:
        w_in, bias_in = (reference.weights[f"core.{which}.{part}"] for part in ("w_in", "bias_in"))
        x = np.maximum(w_in @ x + bias_in, 0)
    return sigmoid(weight @ x + bias.sum())


class OneRule:
    """A halting rule for one token: `look` after every loop sets `fired` and keeps the margin."""

    def __init__(self, reference, threshold):
        self.reference, self.threshold, self.fired, self.quiet = reference, threshold, False, False
        self.margin = np.inf

    def compare(self, value):
        """Whether `value` has reached the threshold; remember how near it came."""
        self.margin = min(self.margin, abs(value - self.threshold) / self.threshold)
        return value >= self.threshold

    def output(self, h):
        return h


class Gate(OneRule):
    def look(self, before, after, last):
        self.fired = self.compare(exit_probability(self.reference, "gate", before, after))


class Delta(OneRule):
    def look(self, before, after, last):
        length = np.sqrt((before**2).sum())
        moved = np.sqrt(((after - before) ** 2).sum())
        quiet = length > 0 and not self.compare(moved / length)
        self.fired, self.quiet = quiet and self.quiet, quiet


class Kl(OneRule):
    def look(self, before, after, last):
        earlier, later = (self.log_probabilities(h) for h in (before, after))
        self.fired = not self.compare((np.exp(later) * (later - earlier)).sum())

    def log_probabilities(self, h):
        logits = self.reference.readout(h)
        return logits - np.logaddexp.reduce(logits)


class Act(OneRule):
    """Graves 2016: p_1, p_2, ... until their sum reaches the threshold, then the remainder."""

    def __init__(self, reference, threshold):
        super().__init__(reference, threshold)
        self.weights, self.states = [], []

    def look(self, before, after, last):
        if self.fired:
            return
        p = exit_probability(self.reference, "act", before, after)
        spent = sum(self.weights)
        self.fired = bool(self.compare(spent + p) or last)
        self.weights.append(1 - spent if self.fired else p)
        self.states.append(after)

    def output(self, h):
        return sum(w * s for w, s in zip(self.weights, self.states, strict=True))

    @property
    def ponder(self):
        """Loops plus remainder."""
        return len(self.weights) + self.weights[-1]


RULES = {"gate": Gate, "delta": Delta, "kl": Kl, "act": Act}
