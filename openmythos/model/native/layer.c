/* One layer for a few rows: attention over kept keys, then feed-forward or experts, in one call.

   At one row the time of a layer is that of reading its weights and of starting its operations;
   here there is one operation, and each weight is read once for all rows. Every sum of a row runs
   in an order that no other row changes, so a row's bits are the same alone and among others.
   Plain C with vectors of eight numbers, for any processor whose compiler knows them. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "attention.h"
#include "products.h"
#include "vectors.h"

/* What `openmythos.model.native.structures` declares, field by field. */

typedef struct {
    const void *weight;  /* (outputs, inputs); null: there is no such map */
    const float *scale;  /* (outputs), of int8 */
    const void *down;    /* (loops, rank, inputs), depth-wise LoRA; null: none */
    const void *up;      /* (loops, outputs, rank) */
    int64_t kind, outputs, inputs, rank, loops;
} Map;

typedef struct {
    const void *weight;  /* (experts, inputs, outputs); int8: (experts, outputs, inputs) */
    const float *scale;  /* (experts, outputs), of int8 */
    int64_t kind, outputs, inputs;
} Stack;

typedef struct {
    int64_t kind;  /* of all weights but int8 matrices: FP32 or BF16 */
    int64_t hidden, heads, kv_heads, head_dim;
    int64_t latent, nope, rope, value;  /* of latent attention; latent 0: grouped queries */
    int64_t interleaved, sandwich, swiglu, size;
    int64_t experts, chosen, expert_size, routers;
    float eps, routed_scale, balance_rate, score_scale;
    const void *attention_norm, *feed_forward_norm;
    const void *attention_out_norm, *feed_forward_out_norm;  /* null: placement `pre` */
    const void *qk_scale, *qk_bias;                          /* (heads + kv_heads, head_dim) */
    const void *q_norm, *kv_norm, *q_scale, *k_scale;        /* of latent attention */
    const void *kv_up;                                       /* (heads, nope + value, latent) */
    Map qkv, q_down, q_up, kv_down, out, w_in, w_out;
    const void *router;      /* (routers, experts, hidden): loop t has number min(t, routers - 1) */
    const int32_t *balance;  /* (experts) */
    Stack experts_in, experts_out;
} Layer;

typedef struct {
    int64_t rows, rope_rows, threads;
    float *h;                     /* (rows, hidden), changed in place */
    const float *cos, *sin;       /* (rope_rows, rotated); row r has number r mod rope_rows */
    int64_t loop;                 /* for LoRA; added to each row's own */
    const int64_t *loops;         /* (rows); null: 0 */
    void *keys, *values;          /* (places, kept) */
    const int64_t *write, *also;  /* (rows) places of a row's own entry; also: -1 for none */
    const int64_t *const *read;   /* (rows) lists of places that a row sees; null: they follow */
    const int64_t *first;         /* (rows) the first place of each, where they follow */
    const int64_t *counts;        /* (rows) how many */
    const int64_t *given;         /* (rows, chosen) experts to take; null: the router chooses */
    int64_t *choice;              /* (rows, chosen) experts taken */
    float *work;                  /* as much as `work_size` says */
    int64_t most_keys, kind;      /* kind: of what is kept, FP32 or BF16 */
} Call;

enum { NEVER, GATE, CHANGE };

typedef struct {
    const int64_t *budgets;   /* (rows) loops that each may still run */
    const int64_t *kinds;     /* (rows) the rule of each */
    const float *thresholds;  /* (rows) */
    const float *gate_in, *gate_in_bias;  /* (gate_size, hidden + 1), (gate_size) of the gate */
    const float *gate, *bias;  /* (gate_size, or hidden + 1 if that is 0), (1); null: none has GATE */
    uint8_t *quiet;  /* (rows) for CHANGE: whether the last loop moved the state little */
    uint8_t *fired;  /* (rows) whether the rule had fired before the last loop that was run */
    uint8_t *fires;  /* (rows) whether it fires after it */
    float *before;   /* (rows, hidden) scratch */
    int64_t gate_size, ran;  /* ran: loops, until the first row left */
} Exits;

typedef struct {
    int64_t loops, layers, start, slots;  /* loop t, from `start`, has slot min(t, slots - 1) */
    const Layer *const *layer;     /* (layers) */
    void *const *keys, *const *values;  /* (layers), their slot 0 */
    int64_t keys_step, values_step;     /* numbers from slot to slot */
    int64_t places_step;  /* from loop to loop in the call's `write`, `also` and `read` */
    const float *carry;  /* (hidden), times h, before each loop; null: 1 */
    const float *drive;  /* (rows, hidden), added then; null: 0 */
    const void *norm;    /* (hidden), after each loop; null: none */
    Exits *exits;        /* null: all rows run all loops */
    float eps;
} Core;

typedef struct {
    int64_t kind, hidden, layers;
    const Layer *const *layer;          /* (layers) */
    void *const *keys, *const *values;  /* (layers) */
    const int64_t *ids;      /* (rows) tokens whose embeddings the rows are; null: they are given */
    Map embedding;           /* (vocabulary, hidden) */
    Map output;              /* what the core's states pass first; null: nothing */
    const void *first_norm;  /* (hidden), before the layers; null: none */
    const void *last_norm;   /* (hidden), after them */
    float scale, eps;        /* scale: of embeddings */
} Outer;

typedef struct {
    Map map;
    const void *norm;    /* (inputs), of x; null: none */
    const float *times;  /* (outputs), of y; null: 1 */
    int64_t norm_kind;
    float eps, factor;   /* factor: of all of y */
} Linear;

typedef struct {
    const Outer *before, *after;
    const Linear *drive;  /* from the prelude's output to what enters each loop; null: itself */
    const Linear *readout;
    Core *core;
    const float *step, *rate;  /* (hidden) raw numbers of the injection; null: its carry is there */
    float *times, *carry;      /* (hidden) what is made of them */
    float *e, *driven;         /* (rows, hidden) scratch */
    float *logits;             /* (rows, vocabulary) */
    int64_t injected, first_is_e, kind;
    int64_t outer_threads, drive_threads, core_threads, readout_threads;
    float floor, largest;
} Model;

/* Their sizes, in the order of `STRUCTURES`: whoever loads this code asks before using any. */
void structure_sizes(int64_t *sizes) {
    const int64_t found[] = {sizeof(Map),  sizeof(Stack), sizeof(Layer),  sizeof(Call), sizeof(Exits),
                             sizeof(Core), sizeof(Outer), sizeof(Linear), sizeof(Model)};
    memcpy(sizes, found, sizeof found);
}

/* One thread's share of a call */

static int64_t most(int64_t x, int64_t y) { return x > y ? x : y; }
static int64_t lanes(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

/* Numbers of scratch memory that each thread needs for experts. */
static int64_t own_size(const Layer *l, int64_t rows) {
    return lanes(most(rows * (l->hidden + l->experts_in.outputs + l->expert_size), 2 * l->experts));
}

typedef struct {
    int64_t number, count;
} Thread;

INLINE void share(Thread t, int64_t items, int64_t unit, int64_t *from, int64_t *to) {
    int64_t units = (items + unit - 1) / unit;
    *from = units * t.number / t.count * unit;
    *to = units * (t.number + 1) / t.count * unit;
    if (*to > items) *to = items;
}

static void wait_for_all(Thread t) {
#ifdef _OPENMP
    if (t.count > 1) {
#pragma omp barrier
    }
#endif
    (void)t;
}

static int64_t loop_of(const Call *call, int64_t row, int64_t last) {
    int64_t loop = call->loop + (call->loops ? call->loops[row] : 0);
    return loop < last ? loop : last;
}

static Matrix matrix_of(const Map *m) {
    return (Matrix){m->weight, m->scale, m->kind, m->outputs, m->inputs};
}

/* y = x W^T for all rows, with the loop's own correction; ends with everything written. */
static void map(const Map *m, const Call *call, Thread t, const float *x, float *y) {
    int64_t from, to;
    Matrix weights = matrix_of(m);
    share(t, m->outputs, UNIT, &from, &to);
    product(&weights, x, call->rows, m->inputs, from, to, y, m->outputs);
    wait_for_all(t);
    if (!m->down) return;
    int64_t kind = m->kind == BF16 ? BF16 : FP32;
    share(t, call->rows, 1, &from, &to);
    for (int64_t row = from; row < to; row++) {
        int64_t loop = loop_of(call, row, m->loops - 1);
        Matrix down = {at(m->down, loop * m->rank * m->inputs, kind), 0, kind, m->rank, m->inputs};
        const void *up = at(m->up, loop * m->outputs * m->rank, kind);
        float inner[m->rank];
        product(&down, x + row * m->inputs, 1, m->inputs, 0, m->rank, inner, m->rank);
        for (int64_t o = 0; o < m->outputs; o++) {
            float total = 0;
            for (int64_t i = 0; i < m->rank; i++)
                total += one_at(up, o * m->rank + i, kind) * inner[i];
            y[row * m->outputs + o] += total;
        }
    }
    wait_for_all(t);
}

/* Rows */

static void normalise(const float *x, const void *gain, int64_t kind, float eps, int64_t n,
                      float *y) {
    wide scale = all(1.0f / sqrtf(dot(x, x, n, FP32) / (float)n + eps));
    for (int64_t i = 0; i < n; i += LANES)
        store(y + i, load(x + i) * scale * wide_at(gain, i, kind));
}

static void rotate(float *x, const float *cos, const float *sin, int64_t n, int64_t interleaved) {
    float turned[n];
    int64_t half = n / 2;
    for (int64_t i = 0; i < n; i++) {
        int64_t partner = interleaved ? (i ^ 1) : (i < half ? i + half : i - half);
        turned[i] = x[i] * cos[i] + x[partner] * sin[i];
    }
    memcpy(x, turned, n * sizeof(float));
}

static void residual(const Layer *l, const void *gain, float *h, float *y) {
    if (gain && !l->sandwich) normalise(y, gain, l->kind, l->eps, l->hidden, y);
    for (int64_t i = 0; i < l->hidden; i += LANES) store(h + i, load(h + i) + load(y + i));
    if (gain && l->sandwich) normalise(h, gain, l->kind, l->eps, l->hidden, h);
}

static void activate(int64_t swiglu, const float *x, int64_t size, float scale, float *y) {
    for (int64_t i = 0; i < size; i += LANES) {
        wide gate = load(x + i);
        if (swiglu)
            gate = gate / (all(1) + exponential(-gate)) * load(x + size + i);
        else {
            gate = -smaller(all(0), -gate);  /* in this order one that is no number stays so */
            gate *= gate;
        }
        store(y + i, gate * all(scale));
    }
}

/* Attention */

static void put(void *entries, int64_t first, int64_t kind, const float *entry, int64_t kept) {
    if (kind == BF16)
        for (int64_t i = 0; i < kept; i++) ((bf16 *)entries)[first + i] = narrow(entry[i]);
    else
        memcpy((float *)entries + first, entry, kept * sizeof(float));
}

static void keep(const Call *call, int64_t row, void *entries, int64_t kind, int64_t kept,
                 const float *entry) {
    put(entries, call->write[row] * kept, kind, entry, kept);
    if (call->also && call->also[row] >= 0)
        put(entries, call->also[row] * kept, kind, entry, kept);
}

static const float *angles(const Call *call, const float *table, int64_t row, int64_t n) {
    return table + row % call->rope_rows * n;
}

/* Where queries of a call lie: number i of row r at first + r * row + i * step. */
typedef struct {
    float *first;
    int64_t row, step;
} Queries;

/* Most queries that are answered at a time. */
static int64_t most_beside(const Layer *l, int64_t rows) {
    int64_t of_one = l->latent ? l->heads : l->heads / l->kv_heads;
    return rows * of_one < most(BESIDE, of_one) ? rows * of_one : most(BESIDE, of_one);
}

/* Attention of all rows: `groups` times `beside` queries each, of which one group reads the same
   keys and values. Rows that follow each other and read the same places are answered together. */
static void attend_in_bands(const Call *call, Thread t, Shared shared, int64_t groups,
                            int64_t beside, Queries q, Queries y, float *work) {
    const char *keys = shared.keys, *values = shared.values;
    int64_t parts = groups < t.count && t.count <= beside ? t.count : 1, turn = 0;
    int64_t size = (beside + parts - 1) / parts, band = most(1, BESIDE / size);
    for (int64_t row = 0, end; row < call->rows; row = end) {
        for (end = row + 1; end < call->rows && end - row < band; end++)
            if (call->read ? call->read[end] != call->read[row]
                           : call->first[end] != call->first[row])
                break;
        shared.places = call->read ? call->read[row] : 0;
        shared.first = call->read ? 0 : call->first[row];
        for (int64_t item = 0; item < groups * parts; item++) {
            if (turn++ % t.count != t.number) continue;
            int64_t group = item / parts, from = item % parts * size, n = 0;
            int64_t to = from + size < beside ? from + size : beside;
            const float *of[(end - row) * size];
            float *into[(end - row) * size];
            int64_t counts[(end - row) * size];
            for (int64_t r = row; r < end; r++)
                for (int64_t i = from; i < to; i++, n++) {
                    int64_t number = group * beside + i;
                    of[n] = q.first + r * q.row + number * q.step;
                    into[n] = y.first + r * y.row + number * y.step;
                    counts[n] = call->counts[r];
                }
            shared.keys = at(keys, group * shared.width, shared.kind);
            shared.values = at(values, group * shared.value, shared.kind);
            if (n) attend(&shared, n, of, counts, work, into);
        }
    }
    wait_for_all(t);
}

/* `kind` is that of what is kept, apart from the weights' own. */
INLINE float *grouped_attention(const Layer *l, int64_t kind, const Call *call, Thread t,
                                const float *x, float *work, float *own_work) {
    int64_t d = l->head_dim, heads = l->heads, turned = heads + l->kv_heads, from, to;
    int64_t width = l->qkv.outputs, kept = l->kv_heads * d, own_kind = l->kind;
    float *qkv = work, *y = work + call->rows * width;
    map(&l->qkv, call, t, x, qkv);
    share(t, call->rows, 1, &from, &to);
    for (int64_t row = from; row < to; row++) {
        float *own = qkv + row * width;
        const float *cos = angles(call, call->cos, row, d), *sin = angles(call, call->sin, row, d);
        for (int64_t head = 0; head < turned; head++) {
            float *q = own + head * d;
            if (l->qk_bias)
                for (int64_t i = 0; i < d; i++) q[i] += one_at(l->qk_bias, head * d + i, own_kind);
            if (l->qk_scale)
                normalise(q, at(l->qk_scale, head * d, own_kind), own_kind, l->eps, d, q);
            rotate(q, cos, sin, d, l->interleaved);
        }
        keep(call, row, call->keys, kind, kept, own + heads * d);
        keep(call, row, call->values, kind, kept, own + turned * d);
    }
    wait_for_all(t);
    Shared shared = {.kind = kind, .keys = call->keys, .values = call->values, .kept = kept,
                     .width = d, .value = d, .scale = l->score_scale};
    attend_in_bands(call, t, shared, l->kv_heads, heads / l->kv_heads, (Queries){qkv, width, d},
                    (Queries){y, heads * d, d}, own_work);
    return y;
}

/* Absorbed: queries are mapped into the latent, and the kept latents are keys and values. */
INLINE float *latent_attention(const Layer *l, int64_t kind, const Call *call, Thread t,
                               const float *x, float *work, float *own_work) {
    int64_t rows = call->rows, width = l->nope + l->rope, kept = l->latent + l->rope, from, to;
    int64_t of_row = l->heads * width, mapped_row = l->heads * kept;
    int64_t seen_row = l->heads * l->latent, own_kind = l->kind;
    float *latent = work, *query = latent + rows * kept, *mapped = query + rows * of_row;
    float *seen = mapped + rows * mapped_row, *y = seen + rows * seen_row;
    float *narrow = y + rows * l->heads * l->value;
    map(&l->kv_down, call, t, x, latent);
    if (l->q_down.weight) {
        map(&l->q_down, call, t, x, narrow);
        share(t, rows, 1, &from, &to);
        for (int64_t row = from; row < to; row++) {
            float *own = narrow + row * l->q_down.outputs;
            normalise(own, l->q_norm, own_kind, l->eps, l->q_down.outputs, own);
        }
        wait_for_all(t);
        x = narrow;
    }
    map(&l->q_up, call, t, x, query);
    share(t, rows, 1, &from, &to);
    for (int64_t row = from; row < to; row++) {
        const float *cos = angles(call, call->cos, row, l->rope);
        const float *sin = angles(call, call->sin, row, l->rope);
        float *own = latent + row * kept, *key = own + l->latent;
        if (l->k_scale) normalise(key, l->k_scale, own_kind, l->eps, l->rope, key);
        rotate(key, cos, sin, l->rope, l->interleaved);
        normalise(own, l->kv_norm, own_kind, l->eps, l->latent, own);
        keep(call, row, call->keys, kind, kept, own);
        for (int64_t head = 0; head < l->heads; head++) {
            float *q = query + (row * l->heads + head) * width;
            if (l->q_scale)
                normalise(q, at(l->q_scale, head * width, own_kind), own_kind, l->eps, width, q);
            rotate(q + l->nope, cos, sin, l->rope, l->interleaved);
        }
    }
    wait_for_all(t);
    share(t, l->heads, 1, &from, &to);
    for (int64_t head = from; head < to; head++) {
        const void *to_key = at(l->kv_up, head * (l->nope + l->value) * l->latent, own_kind);
        const float *q = query + head * width;
        float *own = mapped + head * kept;
        columns(q, rows, of_row, to_key, own_kind, l->nope, l->latent, own, mapped_row);
        for (int64_t row = 0; row < rows; row++)
            memcpy(own + row * mapped_row + l->latent, q + row * of_row + l->nope,
                   l->rope * sizeof(float));
    }
    wait_for_all(t);
    Shared shared = {.kind = kind, .keys = call->keys, .values = call->keys, .kept = kept,
                     .width = kept, .value = l->latent, .scale = l->score_scale};
    attend_in_bands(call, t, shared, 1, l->heads, (Queries){mapped, mapped_row, kept},
                    (Queries){seen, seen_row, l->latent}, own_work);
    for (int64_t head = from; head < to; head++) {
        int64_t first = head * (l->nope + l->value) + l->nope;
        const void *of_head = at(l->kv_up, first * l->latent, own_kind);
        Matrix to_value = {of_head, 0, own_kind, l->value, l->latent};
        product(&to_value, seen + head * l->latent, rows, seen_row, 0, l->value,
                y + head * l->value, l->heads * l->value);
    }
    wait_for_all(t);
    return y;
}

static float *attention(const Layer *l, const Call *call, Thread t, const float *x, float *work,
                        float *own_work) {
    if (call->kind == BF16)  /* each with loads of its own */
        return l->latent ? latent_attention(l, BF16, call, t, x, work, own_work)
                         : grouped_attention(l, BF16, call, t, x, work, own_work);
    return l->latent ? latent_attention(l, FP32, call, t, x, work, own_work)
                     : grouped_attention(l, FP32, call, t, x, work, own_work);
}

/* Feed-forward */

static void feed_forward(const Layer *l, const Call *call, Thread t, const float *x, float *work,
                         float *y) {
    int64_t from, to, parts = l->w_in.outputs;
    float *wider = work, *inner = work + call->rows * parts;
    map(&l->w_in, call, t, x, wider);
    share(t, call->rows, 1, &from, &to);
    for (int64_t row = from; row < to; row++)
        activate(l->swiglu, wider + row * parts, l->size, 1, inner + row * l->size);
    wait_for_all(t);
    map(&l->w_out, call, t, inner, y);
}

/* Choose a row's experts, the best by affinity + bias, and weigh them by affinity alone. */
static void route(const Layer *l, const Call *call, int64_t row, const float *x, float *scores,
                  float *weights) {
    int64_t *choice = call->choice + row * l->chosen;
    int64_t size = l->experts * l->hidden, loop = loop_of(call, row, l->routers - 1);
    Matrix router = {at(l->router, loop * size, l->kind), 0, l->kind, l->experts, l->hidden};
    product(&router, x, 1, l->hidden, 0, l->experts, scores, l->experts);
    if (call->given)
        memcpy(choice, call->given + row * l->chosen, l->chosen * sizeof(int64_t));
    else {
        float *affinity = scores + l->experts;
        for (int64_t e = 0; e < l->experts; e++) {
            affinity[e] = 1.0f / (1.0f + expf(-scores[e])) + (float)l->balance[e] * l->balance_rate;
            if (isnan(affinity[e])) affinity[e] = INFINITY;  /* as torch's topk has it */
        }
        for (int64_t n = 0; n < l->chosen; n++) {
            int64_t best = -1;
            for (int64_t e = 0; e < l->experts; e++)
                if (!isnan(affinity[e]) && (best < 0 || affinity[e] > affinity[best])) best = e;
            choice[n] = best;
            affinity[best] = NAN;  /* taken */
        }
    }
    float most = -INFINITY, total = 0;
    for (int64_t n = 0; n < l->chosen; n++) {
        float s = scores[choice[n]];  /* log(sigmoid(s)), for any s */
        weights[n] = (s < 0 ? s : 0) - log1pf(expf(-fabsf(s)));
        most = weights[n] > most ? weights[n] : most;
    }
    for (int64_t n = 0; n < l->chosen; n++) total += weights[n] = expf(weights[n] - most);
    for (int64_t n = 0; n < l->chosen; n++) weights[n] /= total;
}

static void multiply(const Stack *s, int64_t expert, const float *x, int64_t rows, float *y) {
    const void *weights = at(s->weight, expert * s->inputs * s->outputs, s->kind);
    if (s->kind == INT8) {
        Matrix own = {weights, s->scale + expert * s->outputs, INT8, s->outputs, s->inputs};
        product(&own, x, rows, s->inputs, 0, s->outputs, y, s->outputs);
    } else
        columns(x, rows, s->inputs, weights, s->kind, s->inputs, s->outputs, y, s->outputs);
}

/* What an expert makes of the rows of so many pairs of row and expert, at most all rows. */
static void take(const Layer *l, int64_t expert, const float *x, int64_t count,
                 const int64_t *pair_of, const float *weights, float *own, float *of_pair) {
    int64_t hidden = l->hidden, wider = l->experts_in.outputs;
    float *gathered = own, *in = own + count * hidden, *inner = in + count * wider;
    for (int64_t n = 0; n < count; n++)
        memcpy(gathered + n * hidden, x + pair_of[n] / l->chosen * hidden, hidden * sizeof(float));
    multiply(&l->experts_in, expert, gathered, count, in);
    for (int64_t n = 0; n < count; n++)
        activate(l->swiglu, in + n * wider, l->expert_size, weights[pair_of[n]] * l->routed_scale,
                 inner + n * l->expert_size);
    multiply(&l->experts_out, expert, inner, count, gathered);
    for (int64_t n = 0; n < count; n++)
        memcpy(of_pair + pair_of[n] * hidden, gathered + n * hidden, hidden * sizeof(float));
}

static void experts(const Layer *l, const Call *call, Thread t, const float *x, float *work,
                    float *y) {
    int64_t rows = call->rows, pairs = rows * l->chosen, hidden = l->hidden, from, to;
    float *weights = work, *of_pair = weights + lanes(pairs);
    float *own = of_pair + pairs * hidden + t.number * own_size(l, rows);
    share(t, rows, 1, &from, &to);
    for (int64_t row = from; row < to; row++)  /* `own` holds scores and affinities */
        route(l, call, row, x + row * hidden, own, weights + row * l->chosen);
    wait_for_all(t);
    for (int64_t expert = 0, turn = 0; expert < l->experts; expert++) {
        int64_t count = 0, pair_of[rows], met = 0;
        for (int64_t pair = 0; pair < pairs; pair++) {
            if (call->choice[pair] != expert) continue;
            if (!met++ && turn++ % t.count != t.number) break;
            if (count == rows) {  /* a row that was told to take an expert twice */
                take(l, expert, x, count, pair_of, weights, own, of_pair);
                count = 0;
            }
            pair_of[count++] = pair;
        }
        if (count) take(l, expert, x, count, pair_of, weights, own, of_pair);
    }
    wait_for_all(t);
    share(t, rows, 1, &from, &to);
    for (int64_t row = from; row < to; row++)
        for (int64_t i = 0; i < hidden; i += LANES) {
            wide total = all(0);
            for (int64_t n = 0; n < l->chosen; n++)
                total += load(of_pair + (row * l->chosen + n) * hidden + i);
            store(y + row * hidden + i, total);
        }
    wait_for_all(t);
}

/* The layer */

static int64_t stage_size(const Layer *l, int64_t rows, int64_t threads) {
    int64_t attention = rows * (l->qkv.outputs + l->heads * l->head_dim);
    if (l->latent)
        attention = rows * (l->latent + l->rope + l->q_down.outputs +
                            l->heads * (l->nope + l->value + 2 * (l->latent + l->rope)));
    int64_t dense = rows * (l->w_in.outputs + l->size), pairs = rows * l->chosen;
    int64_t routed = lanes(pairs) + pairs * l->hidden + threads * own_size(l, rows);
    return most(attention, most(dense, l->experts ? routed : 0));
}

/* Numbers of scratch memory that a call needs. */
int64_t work_size(const Layer *l, int64_t rows, int64_t most_keys, int64_t threads) {
    return 3 * rows * l->hidden + threads * attend_size(most_beside(l, rows), most_keys) +
           stage_size(l, rows, threads);
}

static void run(const Layer *l, const Call *call, Thread t) {
    int64_t rows = call->rows, hidden = l->hidden, from, to;
    float *x = call->work, *y = x + rows * hidden, *z = y + rows * hidden;
    int64_t each = attend_size(most_beside(l, rows), call->most_keys);
    float *own_work = z + rows * hidden + t.number * each;
    float *work = z + rows * hidden + t.count * each;
    share(t, rows, 1, &from, &to);
    for (int64_t row = from; row < to; row++)
        normalise(call->h + row * hidden, l->attention_norm, l->kind, l->eps, hidden,
                  x + row * hidden);
    wait_for_all(t);
    float *attended = attention(l, call, t, x, work, own_work);
    map(&l->out, call, t, attended, y);
    for (int64_t row = from; row < to; row++) {
        float *h = call->h + row * hidden;
        residual(l, l->attention_out_norm, h, y + row * hidden);
        normalise(h, l->feed_forward_norm, l->kind, l->eps, hidden, x + row * hidden);
    }
    wait_for_all(t);
    if (l->experts) {
        experts(l, call, t, x, work, y);
        if (l->w_in.weight) {
            feed_forward(l, call, t, x, work, z);
            for (int64_t row = from; row < to; row++)
                for (int64_t i = row * hidden; i < (row + 1) * hidden; i += LANES)
                    store(y + i, load(y + i) + load(z + i));
        }
    } else
        feed_forward(l, call, t, x, work, y);
    for (int64_t row = from; row < to; row++)
        residual(l, l->feed_forward_out_norm, call->h + row * hidden, y + row * hidden);
    wait_for_all(t);
}

/* `openmythos.model.halting.LearnedExit`, of a state that a loop moved by so much. */
static float exit_logit(const Exits *exits, const float *h, float moved, int64_t n) {
    float length = sqrtf(dot(h, h, n, FP32)) + 1e-8f, scale = sqrtf((float)n) / length;
    float change = logf(moved / length + 1e-6f), total = *exits->bias;
    if (!exits->gate_size)
        return dot(h, exits->gate, n, FP32) * scale + exits->gate[n] * change + total;
    for (int64_t unit = 0; unit < exits->gate_size; unit++) {
        const float *w = exits->gate_in + unit * (n + 1);
        float inner = dot(h, w, n, FP32) * scale + w[n] * change + exits->gate_in_bias[unit];
        if (inner > 0) total += exits->gate[unit] * inner;
    }
    return total;
}

/* The rules of `openmythos.model.halting` that need a row's state alone. */
static int fires(Exits *exits, int64_t row, const float *h, int64_t n) {
    const float *before = exits->before + row * n;
    wide total = all(0);
    for (int64_t i = 0; i < n; i += LANES) {
        wide moved = load(h + i) - load(before + i);
        total = fuse(moved, moved, total);
    }
    float moved = sqrtf(sum(total)), threshold = exits->thresholds[row];
    if (exits->kinds[row] == GATE)
        return 1.0f / (1.0f + expf(-exit_logit(exits, h, moved, n))) >= threshold;
    int was = exits->quiet[row];
    exits->quiet[row] = moved < threshold * sqrtf(dot(before, before, n, FP32));
    return was && exits->quiet[row];
}

/* h = layers(carry * h + drive), as often as there are loops, or until a row leaves: in the last
   loop of its budget, or in the one after its rule has fired. */
static void run_loops(const Core *core, Call call, Thread t) {
    const Layer *l = core->layer[0];
    Exits *exits = core->exits;
    int64_t from, to, hidden = l->hidden, last = core->loops - 1;
    share(t, call.rows, 1, &from, &to);
    for (int64_t loop = 0; loop <= last; loop++) {
        int64_t number = core->start + loop;
        int64_t slot = number < core->slots ? number : core->slots - 1;
        for (int64_t row = 0; exits && row < call.rows; row++)
            if (exits->fired[row] || exits->budgets[row] == loop + 1) last = loop;
        for (int64_t row = from; row < to; row++) {
            float *h = call.h + row * hidden;
            if (exits) memcpy(exits->before + row * hidden, h, hidden * sizeof(float));
            for (int64_t i = 0; core->carry && i < hidden; i += LANES)
                store(h + i, load(core->carry + i) * load(h + i));
            for (int64_t i = 0; core->drive && i < hidden; i += LANES)
                store(h + i, load(h + i) + load(core->drive + row * hidden + i));
        }
        for (int64_t layer = 0; layer < core->layers; layer++) {
            l = core->layer[layer];
            call.keys = (void *)at(core->keys[layer], slot * core->keys_step, call.kind);
            call.values = (void *)at(core->values[layer], slot * core->values_step, call.kind);
            run(l, &call, t);
            if (call.choice) call.choice += call.rows * l->chosen;
        }
        call.write += core->places_step;
        if (call.also) call.also += core->places_step;
        if (call.read) call.read += core->places_step;
        if (core->norm)
            for (int64_t row = from; row < to; row++)
                normalise(call.h + row * hidden, core->norm, l->kind, core->eps, hidden,
                          call.h + row * hidden);
        call.loop++;
        for (int64_t row = from; exits && row < to; row++) {
            int64_t kind = exits->kinds[row];
            exits->fires[row] = kind != NEVER && fires(exits, row, call.h + row * hidden, hidden);
            if (loop < last) exits->fired[row] = exits->fires[row];
        }
        if (exits) wait_for_all(t);  /* all read what has fired */
    }
    if (exits && t.number == 0) exits->ran = last + 1;
}

void run_core(const Core *core, const Call *call) {
#ifdef _OPENMP
    if (call->threads > 1) {
#pragma omp parallel num_threads((int)call->threads)
        run_loops(core, *call, (Thread){omp_get_thread_num(), omp_get_num_threads()});
        return;
    }
#endif
    run_loops(core, *call, (Thread){0, 1});
}

void run_layer(const Layer *l, const Call *call) {
    Core once = {.loops = 1, .layers = 1, .slots = 1, .layer = &l, .keys = &call->keys,
                 .values = &call->values};
    run_core(&once, call);
}

/* Layers that run once, and what stands before and behind them. */
static void run_once(const Outer *o, Call call, Thread t) {
    int64_t from, to, n = o->hidden;
    share(t, call.rows, 1, &from, &to);
    for (int64_t row = from; o->ids && row < to; row++) {
        int64_t id = o->ids[row];
        wide scale = all(o->scale);
        for (int64_t i = 0; i < n; i += LANES) {
            wide x = o->embedding.kind == INT8
                         ? widen((const int8_t *)o->embedding.weight + id * n + i) *
                               all(o->embedding.scale[id])
                         : wide_at(o->embedding.weight, id * n + i, o->embedding.kind);
            store(call.h + row * n + i, x * scale);
        }
    }
    if (o->output.weight) {
        map(&o->output, &call, t, call.h, call.work);
        memcpy(call.h + from * n, call.work + from * n, (to - from) * n * sizeof(float));
        wait_for_all(t);
    }
    for (int64_t row = from; o->first_norm && row < to; row++)
        normalise(call.h + row * n, o->first_norm, o->kind, o->eps, n, call.h + row * n);
    for (int64_t layer = 0; layer < o->layers; layer++) {
        call.keys = o->keys[layer];
        call.values = o->values[layer];
        run(o->layer[layer], &call, t);
    }
    for (int64_t row = from; o->last_norm && row < to; row++)
        normalise(call.h + row * n, o->last_norm, o->kind, o->eps, n, call.h + row * n);
}

void run_outer(const Outer *outer, const Call *call) {
#ifdef _OPENMP
    if (call->threads > 1) {
#pragma omp parallel num_threads((int)call->threads)
        run_once(outer, *call, (Thread){omp_get_thread_num(), omp_get_num_threads()});
        return;
    }
#endif
    run_once(outer, *call, (Thread){0, 1});
}

/* y (rows, outputs) = x (rows, inputs) times the map transposed; `work` is as large as x. */
void run_linear(const Linear *l, const float *x, int64_t rows, float *y, float *work,
                int64_t threads) {
    const Map *m = &l->map;
    (void)threads;
    for (int64_t row = 0; l->norm && row < rows; row++)
        normalise(x + row * m->inputs, l->norm, l->norm_kind, l->eps, m->inputs,
                  work + row * m->inputs);
    if (l->norm) x = work;
#ifdef _OPENMP
#pragma omp parallel num_threads((int)threads) if (threads > 1)
#endif
    {
        Thread t = {0, 1};
#ifdef _OPENMP
        if (threads > 1) t = (Thread){omp_get_thread_num(), omp_get_num_threads()};
#endif
        int64_t from, to;
        Matrix weights = matrix_of(m);
        share(t, m->outputs, UNIT, &from, &to);
        product(&weights, x, rows, m->inputs, from, to, y, m->outputs);
        for (int64_t row = 0; row < rows; row++) {
            float *own = y + row * m->outputs;
            for (int64_t o = from; l->times && o < to; o++) own[o] *= l->times[o];
            for (int64_t o = from; l->factor != 1 && o < to; o++) own[o] *= l->factor;
        }
    }
}

/* The constants of a linear time-invariant injection, from its raw numbers. */
static float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }

void run_constants(const float *step, const float *rate, int64_t n, float floor, float largest,
                   float *times, float *carry) {
    for (int64_t i = 0; i < n; i++) {
        float wide_step = softplus(step[i]);
        times[i] = largest * tanhf(wide_step / largest);
        carry[i] = expf(-(floor + wide_step * softplus(rate[i])));
    }
}

/* As a tensor of that kind holds them. */
static void rounded(float *x, int64_t n, int64_t kind) {
    for (int64_t i = 0; kind == BF16 && i < n; i++) {
        bf16 half = narrow(x[i]);
        x[i] = one_at(&half, 0, BF16);
    }
}

/* Whether every row has left: its rule had fired before the last loop, or its budget is spent. */
static int all_left(const Exits *exits, int64_t rows) {
    for (int64_t row = 0; exits && row < rows; row++)
        if (!exits->fired[row] && exits->budgets[row] != exits->ran) return 0;
    return 1;
}

/* Token ids to logits, for rows that enter and leave the core together; returns whether they left.
   `before` null: they are in the core, and their states and what enters each loop are there.
   `after` null: what follows the core is not asked for. The three calls share h and work. */
int run_model(const Model *m, const Call *before, const Call *inside, const Call *after) {
    int64_t hidden = m->before->hidden, n = inside->rows * hidden;
    if (before) {
        Call call = *before;
        call.threads = m->outer_threads;
        run_outer(m->before, &call);
        rounded(call.h, n, m->kind);
        memcpy(m->e, call.h, n * sizeof(float));
        if (m->step)
            run_constants(m->step, m->rate, hidden, m->floor, m->largest, m->times, m->carry);
        if (m->drive) run_linear(m->drive, m->e, call.rows, m->driven, 0, m->drive_threads);
        m->core->drive = m->drive ? m->driven : m->injected ? m->e : 0;
        if (!m->first_is_e) memset(call.h, 0, n * sizeof(float));
    }
    Call call = *inside;
    call.threads = m->core_threads;
    run_core(m->core, &call);
    if (!after || !all_left(m->core->exits, call.rows)) return 0;
    call = *after;
    call.threads = m->outer_threads;
    run_outer(m->after, &call);
    rounded(call.h, n, m->kind);
    run_linear(m->readout, call.h, call.rows, m->logits, call.work, m->readout_threads);
    return 1;
}
