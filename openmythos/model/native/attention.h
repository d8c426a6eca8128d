/* Attention of a few queries over entries that all of them read: each is then read once.

   A query's own sums run over numbers, and over entries, in one order, whichever queries stand
   beside it. */

#ifndef OPENMYTHOS_ATTENTION
#define OPENMYTHOS_ATTENTION

#include "products.h"
#include "vectors.h"

typedef struct {
    int64_t kind;                /* FP32 or BF16 */
    const void *keys, *values;   /* where an entry's key and value lie in the place 0 */
    int64_t kept;                /* numbers from place to place */
    int64_t width, value;        /* numbers of a key, and of a value */
    const int64_t *places;       /* of entries; null: they follow `first` */
    int64_t first;
    float scale;                 /* of scores */
} Shared;

enum {
    BESIDE = 64,  /* queries at a time, or those of one row where they are more */
    SOON = 16     /* entries from one that is read to one that is asked for */
};

/* Entries lie anywhere, so the processor has no guess of its own where the next ones are. */
INLINE void ask_entry(const void *entry, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)entry + i);
}

/* Room for the scores of a query, and numbers of scratch memory for some. */
INLINE int64_t score_room(int64_t entries) { return (entries + CHUNK - 1) / CHUNK * CHUNK; }
INLINE int64_t attend_size(int64_t queries, int64_t entries) {
    return (queries + 2) * score_room(entries);
}

INLINE int64_t place_of(const Shared *s, int64_t entry) {
    return s->places ? s->places[entry] : s->first + entry;
}

/* Softmax of the first scores, in place but for the factor that is returned, one over their sum;
   those up to `room` become 0. */
static float soften(float *scores, int64_t count, int64_t room) {
    int64_t padded = (count + LANES - 1) / LANES * LANES;
    for (int64_t key = count; key < padded; key++) scores[key] = -INFINITY;
    wide highest = load(scores), total = all(0);
    for (int64_t key = LANES; key < padded; key += LANES)
        highest = larger(load(scores + key), highest);
    float most = highest[0];
    for (int lane = 1; lane < LANES; lane++) most = highest[lane] > most ? highest[lane] : most;
    for (int64_t key = 0; key < padded; key += LANES) {
        wide e = exponential(load(scores + key) - all(most));
        for (int64_t lane = count - key; lane < LANES; lane++) e[lane] = 0;
        store(scores + key, e);
        total += e;
    }
    for (int64_t key = padded; key < room; key += LANES) store(scores + key, all(0));
    return 1.0f / sum(total);
}

INLINE void scores_of(int64_t kind, const float *const *q, int64_t queries, const void *const *k,
                      int64_t entries, int64_t width, float scale, float *const *scores) {
    for (int64_t e = 0; e < entries; e += 4) {
        int64_t r = 0;
        for (int64_t i = e + SOON; i < e + SOON + 4 && i < entries; i++)
            ask_entry(k[i], width * bytes_of(kind));
#define SCORE(N)                                                                                 \
    do {                                                                                         \
        four found[N];                                                                           \
        dot_tile(N, kind, q + r, k + e, width, 0, 0, found);                                     \
        for (int i = 0; i < N; i++) *(four_anywhere *)(scores[r + i] + e) = found[i] * scale;    \
    } while (0)
#ifdef PAIRED
        for (; r + 6 <= queries; r += 6) SCORE(6);
#endif
        BY_THREES(queries, SCORE);
#undef SCORE
    }
}

static void all_scores(const Shared *s, const float *const *q, int64_t queries,
                       const void *const *k, int64_t entries, float *const *scores) {
#ifdef TILES
    if (attends_on_tiles(s->kind, s->width, s->value) &&
        tile_scores(q, queries, (const bf16 *const *)k, entries, s->width, s->scale, scores))
        return;
#endif
    if (s->kind == BF16)  /* each with loads of its own */
        scores_of(BF16, q, queries, k, entries, s->width, s->scale, scores);
    else
        scores_of(FP32, q, queries, k, entries, s->width, s->scale, scores);
}

static void weigh_all(const Shared *s, const float *const *weights, int64_t queries,
                      const void *const *v, int64_t entries, float *const *y) {
#ifdef TILES
    enum { SPAN = 512 };  /* sums of so many are added up */
    const float *of[queries];
    int64_t done = 0;
    for (; attends_on_tiles(s->kind, s->width, s->value) && done < entries; done += SPAN) {
        int64_t some = entries - done < SPAN ? entries - done : SPAN;
        for (int64_t i = 0; i < queries; i++) of[i] = weights[i] + done;
        if (!tile_columns(of, queries, (const bf16 *const *)v + done, some, s->value, done > 0, y))
            break;
    }
    if (done >= entries) return;
#endif
    for (int64_t e = 0; e < entries; e += CHUNK) {
        int64_t some = entries - e < CHUNK ? entries - e : CHUNK;
        weigh(s->kind, weights, queries, e, some, v + e, s->value, y);
    }
}

/* y (queries, value): attention of queries, of which number i sees the first `counts[i]` entries.

   All are multiplied with as many entries as the one that sees most; what the others do not see
   weighs 0. `work` is as large as `attend_size` says. */
static void attend(const Shared *s, int64_t queries, const float *const *q, const int64_t *counts,
                   float *work, float *const *y) {
    int64_t entries = 0;
    for (int64_t i = 0; i < queries; i++) entries = counts[i] > entries ? counts[i] : entries;
    int64_t room = score_room(entries);
    const void **of = (const void **)work;
    float *scores = work + 2 * room, *of_query[queries], factors[queries];
    for (int64_t i = 0; i < queries; i++) of_query[i] = scores + i * room;
    /* four keys are multiplied at a time; the last stands for those behind it */
    for (int64_t e = 0; e < room; e++)
        of[e] = at(s->keys, place_of(s, e < entries ? e : entries - 1) * s->kept, s->kind);
    all_scores(s, q, queries, of, entries, of_query);
    for (int64_t i = 0; i < queries; i++) factors[i] = soften(of_query[i], counts[i], room);
    for (int64_t e = 0; e < entries; e++)
        of[e] = at(s->values, place_of(s, e) * s->kept, s->kind);
    weigh_all(s, (const float *const *)of_query, queries, of, entries, y);
    for (int64_t i = 0; i < queries; i++)
        for (int64_t n = 0; n < s->value; n += LANES)
            store(y[i] + n, load(y[i] + n) * all(factors[i]));
}

#endif
