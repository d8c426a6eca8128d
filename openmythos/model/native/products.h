/* Products of rows with matrices.

   A sum over inputs runs in eight lanes (`product`), or input by input (`columns`), or on tiles, or
   in whole numbers, which shapes decide alone. It does not depend on how many rows are multiplied
   at a time. */

#ifndef OPENMYTHOS_PRODUCTS
#define OPENMYTHOS_PRODUCTS

#include "digits.h"
#include "tiles.h"
#include "vectors.h"

#ifdef __AVX512DQ__
#define PAIRED  /* two rows share a register */
#endif

enum {
    FEW = 8,    /* rows for which reading weights in their own order is quicker */
    UNIT = 16,  /* outputs that threads share out at a time */
    CHUNK = 64  /* vectors that are weighed at a time, so that they stay in the first cache */
};

/* Do something for three rows at a time from row r on, then for the rest. */
#define BY_THREES(ROWS, DO)                \
    for (; r + 3 <= (ROWS); r += 3) DO(3); \
    if ((ROWS) - r == 2) DO(2);            \
    if ((ROWS) - r == 1) DO(1)

/* While rows are multiplied with some weights, the next ones are asked for, as many with each tile
   of rows as it takes for all to be there in time: the processor's own guess stops at a tile that
   reads what the cache has. */
INLINE void ask(const char *ahead, int64_t bytes) {
    __builtin_prefetch(ahead);
    if (bytes > 64) __builtin_prefetch(ahead + 64);
}

/* Dot products of rows with four vectors of weights. */
INLINE void dot_tile(int rows, int64_t kind, const float *const *x, const void *const *w,
                     int64_t inputs, const char *ahead, int64_t step, four *found) {
#ifdef PAIRED
    if (rows == 6) {
        __m512 total[3][4], own[3];
        for (int r = 0; r < 3; r++)
            for (int o = 0; o < 4; o++) total[r][o] = _mm512_setzero_ps();
        for (int64_t i = 0; i < inputs; i += LANES, ahead += step) {
            if (step) ask(ahead, step);
            for (int r = 0; r < 3; r++)
                own[r] = _mm512_insertf32x8(_mm512_castps256_ps512((__m256)load(x[2 * r] + i)),
                                            (__m256)load(x[2 * r + 1] + i), 1);
            for (int o = 0; o < 4; o++) {
                __m512 weight = _mm512_broadcast_f32x8((__m256)wide_at(w[o], i, kind));
                for (int r = 0; r < 3; r++)
                    total[r][o] = _mm512_fmadd_ps(own[r], weight, total[r][o]);
            }
        }
        for (int r = 0; r < 3; r++) {
            wide low[4], high[4];
            for (int o = 0; o < 4; o++) {
                low[o] = (wide)_mm512_castps512_ps256(total[r][o]);
                high[o] = (wide)_mm512_extractf32x8_ps(total[r][o], 1);
            }
            found[2 * r] = sums(low);
            found[2 * r + 1] = sums(high);
        }
        return;
    }
#endif
    wide total[3][4], own[3];
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < 4; o++) total[r][o] = all(0);
    for (int64_t i = 0; i < inputs; i += LANES, ahead += step) {
        if (step) ask(ahead, step);
        for (int r = 0; r < rows; r++) own[r] = load(x[r] + i);
        for (int o = 0; o < 4; o++) {
            wide weight = wide_at(w[o], i, kind);
            for (int r = 0; r < rows; r++) total[r][o] = fuse(own[r], weight, total[r][o]);
        }
    }
    for (int r = 0; r < rows; r++) found[r] = sums(total[r]);
}

INLINE void product_of(int64_t kind, const float *const *x, int64_t rows, const void *w,
                       const float *scale, int64_t inputs, int64_t from, int64_t to,
                       float *const *y) {
#ifdef PAIRED
    int64_t tiles = rows / 6 + (rows % 6 + 2) / 3;
#else
    int64_t tiles = (rows + 2) / 3;
#endif
    int64_t part = 4 * inputs * bytes_of(kind) / tiles, step = part * LANES / inputs, o = from;
    for (; o + 4 <= to; o += 4) {
        const void *four_outputs[4];
        for (int i = 0; i < 4; i++) four_outputs[i] = at(w, (o + i) * inputs, kind);
        const char *ahead = at(w, (o + 4) * inputs, kind);
#define PRODUCT(N)                                                                       \
    do {                                                                                 \
        four found[N];                                                                   \
        dot_tile(N, kind, x + r, four_outputs, inputs, ahead, step, found);              \
        for (int i = 0; i < N; i++) {                                                    \
            if (kind == INT8) found[i] *= *(const four_anywhere *)(scale + o);           \
            *(four_anywhere *)(y[r + i] + o) = found[i];                                 \
        }                                                                                \
        ahead += part;                                                                   \
    } while (0)
        int64_t r = 0;
#ifdef PAIRED
        for (; r + 6 <= rows; r += 6) PRODUCT(6);
#endif
        BY_THREES(rows, PRODUCT);
#undef PRODUCT
    }
    for (; o < to; o++)
        for (int64_t r = 0; r < rows; r++)
            y[r][o] = dot(x[r], at(w, o * inputs, kind), inputs, kind) *
                      (kind == INT8 ? scale[o] : 1);
}

/* A matrix (outputs, inputs) with its scales (outputs), if it is in int8. */
typedef struct {
    const void *w;
    const float *scale;
    int64_t kind, outputs, inputs;
} Matrix;

/* y[from:to] = x (rows, inputs) times a matrix transposed. */
static void product(const Matrix *m, const float *x, int64_t rows, int64_t x_row, int64_t from,
                    int64_t to, float *y, int64_t y_row) {
    const float *in[rows];
    float *out[rows];
    for (int64_t r = 0; r < rows; r++) in[r] = x + r * x_row, out[r] = y + r * y_row;
#ifdef TILES
    if (on_tiles(m->kind, m->inputs, m->outputs) &&
        tile_product(in, rows, m->w, m->kind, m->scale, m->inputs, from, to, out))
        return;
#endif
#ifdef DIGIT_PRODUCTS
    if (in_digits(m->kind, m->inputs) &&
        digit_product(in, rows, m->w, m->scale, m->inputs, from, to, out))
        return;
#endif
    if (m->kind == INT8)  /* each with loads of its own */
        product_of(INT8, in, rows, m->w, m->scale, m->inputs, from, to, out);
    else if (m->kind == BF16)
        product_of(BF16, in, rows, m->w, 0, m->inputs, from, to, out);
    else
        product_of(FP32, in, rows, m->w, 0, m->inputs, from, to, out);
}

/* Add up to 64 vectors v, times what a row has for each, to the row's y, or set y to their sum
   where they are the first: for up to four registers of numbers, from number n on. */
INLINE void weigh_tile(int rows, int registers, int64_t kind, const float *const *x, int64_t first,
                       int64_t vectors, const void *const *v, int64_t n, float *const *y) {
    broad total[3][4];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < registers; j++)
            total[r][j] = first ? broad_load(y[r] + n + j * BROAD) : broad_all(0);
    for (int64_t i = 0; i < vectors; i++) {
        broad weight[3];
        if (i + 16 < vectors)
            for (int j = 0; j < registers; j++)
                __builtin_prefetch((const char *)at(v[i + 16], n + j * BROAD, kind));
        for (int r = 0; r < rows; r++) weight[r] = broad_all(x[r][first + i]);
        for (int j = 0; j < registers; j++) {
            broad value = broad_at(v[i], n + j * BROAD, kind);
            for (int r = 0; r < rows; r++) total[r][j] = broad_fuse(weight[r], value, total[r][j]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < registers; j++) broad_store(y[r] + n + j * BROAD, total[r][j]);
}

/* The same for numbers that do not fill a register. */
INLINE void weigh_rest(int64_t rows, int64_t kind, const float *const *x, int64_t first,
                       int64_t vectors, const void *const *v, int64_t n, float *const *y) {
    for (int64_t r = 0; r < rows; r++) {
        wide total = first ? load(y[r] + n) : all(0);
        for (int64_t i = 0; i < vectors; i++)
            total = fuse(all(x[r][first + i]), wide_at(v[i], n, kind), total);
        store(y[r] + n, total);
    }
}

INLINE void weigh_of(int64_t kind, const float *const *x, int64_t rows, int64_t first,
                     int64_t vectors, const void *const *v, int64_t width, float *const *y) {
    int64_t n = 0, r;
#define FOUR(N) weigh_tile(N, 4, kind, x + r, first, vectors, v, n, y + r)
#define ONE(N) weigh_tile(N, 1, kind, x + r, first, vectors, v, n, y + r)
    for (; n + 4 * BROAD <= width; n += 4 * BROAD) {
        r = 0;
        BY_THREES(rows, FOUR);
    }
    for (; n + BROAD <= width; n += BROAD) {
        r = 0;
        BY_THREES(rows, ONE);
    }
#undef FOUR
#undef ONE
    for (; n < width; n += LANES) weigh_rest(rows, kind, x, first, vectors, v, n, y);
}

/* As `weigh_tile`, for any number of rows and all `width` numbers of vectors. */
static void weigh(int64_t kind, const float *const *x, int64_t rows, int64_t first, int64_t vectors,
                  const void *const *v, int64_t width, float *const *y) {
    if (kind == BF16)  /* each with loads of its own */
        weigh_of(BF16, x, rows, first, vectors, v, width, y);
    else
        weigh_of(FP32, x, rows, first, vectors, v, width, y);
}

/* Add x (rows, inputs) times w (inputs, outputs) to y, or set it, for a few inputs and rows. */
INLINE void columns_tile(int rows, int set, const float *const *x, int64_t i, const void *w,
                         int64_t kind, int64_t outputs, float *const *y, const char *ahead,
                         int64_t step) {
    wide input[2][4];
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < 4; k++) input[r][k] = all(x[r][i + k]);
    for (int64_t o = 0; o < outputs; o += LANES, ahead += step) {
        wide total[2];
        ask(ahead, step);
        for (int r = 0; r < rows; r++) total[r] = set ? all(0) : load(y[r] + o);
        for (int k = 0; k < 4; k++) {
            wide weight = wide_at(w, k * outputs + o, kind);
            for (int r = 0; r < rows; r++) total[r] = fuse(input[r][k], weight, total[r]);
        }
        for (int r = 0; r < rows; r++) store(y[r] + o, total[r]);
    }
}

/* A few rows: w is read in its own order, four inputs at a time, and asked for. */
INLINE void few_columns(int64_t kind, const float *const *x, int64_t rows, const void *w,
                        int64_t inputs, int64_t outputs, float *const *y) {
    int64_t size = 4 * outputs * bytes_of(kind);
    int64_t part = size / ((rows + 1) / 2), step = part * LANES / outputs;
    for (int64_t i = 0; i < inputs; i += 4) {
        const void *some = at(w, i * outputs, kind);
        const char *ahead = (const char *)some + size;
        int64_t r = 0;
        for (; r + 2 <= rows; r += 2, ahead += part)
            columns_tile(2, i == 0, x + r, i, some, kind, outputs, y + r, ahead, step);
        if (r < rows) columns_tile(1, i == 0, x + r, i, some, kind, outputs, y + r, ahead, step);
    }
}

/* y = x (rows, inputs) times w (inputs, outputs), of FP32 or BF16. */
static void columns(const float *x, int64_t rows, int64_t x_row, const void *w, int64_t kind,
                    int64_t inputs, int64_t outputs, float *y, int64_t y_row) {
    const float *in[rows];
    float *out[rows];
    for (int64_t r = 0; r < rows; r++) in[r] = x + r * x_row, out[r] = y + r * y_row;
#ifdef TILES
    if (on_tiles(kind, inputs, outputs) && outputs % DEPTH == 0) {
        const bf16 *each[inputs];
        for (int64_t i = 0; i < inputs; i++) each[i] = (const bf16 *)w + i * outputs;
        if (tile_columns(in, rows, each, inputs, outputs, 0, out)) return;
    }
#endif
    if (rows <= FEW && kind == BF16)
        few_columns(BF16, in, rows, w, inputs, outputs, out);
    else if (rows <= FEW)
        few_columns(FP32, in, rows, w, inputs, outputs, out);
    else
        for (int64_t i = 0; i < inputs; i += CHUNK) {
            const void *v[CHUNK];
            int64_t some = inputs - i < CHUNK ? inputs - i : CHUNK;
            for (int64_t k = 0; k < some; k++) v[k] = at(w, (i + k) * outputs, kind);
            weigh(kind, in, rows, i, some, v, outputs, out);
        }
}

#endif
