/* Products on a processor's matrix tiles (AMX): rows in fp32 times weights in bf16 or int8.

   Two tiles multiply 16 x 32 numbers in bf16 by 32 x 16 and add in fp32, or 16 x 64 in int8 by
   64 x 16 and add in whole numbers. A row takes part as several, which are added at the end: with
   weights in bf16 as two rows in bf16, x = upper + lower up to 2^-17 of x; with weights in int8 as
   the three digits to base 128 of whole numbers, x = factor * (16384 a + 128 b + c) up to 2^-21 of
   the row's largest. An element's sum runs over the inputs in one order, whichever others the tile
   holds beside it: a row's bits are the same alone and among others, as everywhere here. */

#ifndef OPENMYTHOS_TILES
#define OPENMYTHOS_TILES

#include "rooms.h"
#include "vectors.h"

#if defined(__linux__) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && \
    defined(__AMX_INT8__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512BF16__)
#define TILES

#include <sys/syscall.h>
#include <unistd.h>

enum {
    SIDE = 16,            /* rows of a tile, and columns of what two make */
    LINE = 64,            /* bytes of a tile's row */
    TILE = SIDE * LINE,   /* and of a tile */
    DEPTH = 32,           /* numbers in bf16 of a tile's row */
    DIGITS = 3,
    BLOCK = 64,           /* outputs at a time */
    ASK_FOR_TILES = 0x1023,
    TILE_DATA = 18
};

/* Whether the system lets this process use tiles; asked once, when the code is loaded. */
static int tiles_allowed;

__attribute__((constructor)) static void ask_for_tiles(void) {
    tiles_allowed = syscall(SYS_arch_prctl, ASK_FOR_TILES, TILE_DATA) == 0;
}

/* Do without tiles, or with them again; returns whether they are used now. */
int use_tiles(int wanted) {
    if (wanted)
        ask_for_tiles();
    else
        tiles_allowed = 0;
    return tiles_allowed;
}

/* Whether a matrix is multiplied on tiles, which its shape decides alone. */
static int on_tiles(int64_t kind, int64_t inputs, int64_t outputs) {
    if (!tiles_allowed || kind == FP32 || outputs < BLOCK) return 0;
    return inputs % (kind == INT8 ? LINE : DEPTH) == 0;
}

static void begin_tiles(void) {
    struct {
        uint8_t palette, start, unused[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.bytes[i] = LINE;
        shapes.rows[i] = SIDE;
    }
    _tile_loadconfig(&shapes);
}

INLINE __m512i widened(__m256i halves) {
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}

/* 32 numbers as two rows in bf16. */
INLINE void split(const float *x, __m512i *upper, __m512i *lower) {
    __m512 first = _mm512_loadu_ps(x), second = _mm512_loadu_ps(x + 16);
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    first -= (__m512)widened(_mm512_castsi512_si256(both));
    second -= (__m512)widened(_mm512_extracti64x4_epi64(both, 1));
    *upper = both;
    *lower = (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

/* The transpose of 16 x 16 numbers of 32 bits, in place. */
INLINE void transpose(__m512i *x) {
    __m512i y[SIDE];
    for (int i = 0; i < SIDE; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < SIDE; i += 4)
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
            x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
        }
    for (int i = 0; i < SIDE; i += 8)
        for (int j = 0; j < 4; j++) {
            y[i + j] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0x88);
            y[i + j + 4] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        x[j] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0x88);
        x[j + 8] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0xdd);
    }
}

/* 64 outputs' weights for tiles, and how they lie. */
enum {
    BYTES,        /* int8 (outputs, inputs), as tiles take them */
    FEWER_BYTES,  /* the same where fewer than 64 outputs are left */
    ROWS,         /* bf16 (outputs, inputs), as tiles take them */
    FEWER_ROWS,
    KEYS,         /* bf16, an address for each output */
    COLUMNS       /* bf16, an address for each input */
};

INLINE int in_bytes(int source) { return source <= FEWER_BYTES; }
INLINE int lying(int source) { return source == BYTES || source == ROWS; }
/* Whether a tile has weights as its rows, and rows of x as its columns. */
INLINE int turned(int source) { return source <= FEWER_ROWS; }
/* Inputs that a tile takes at a time, and rows of x. */
INLINE int64_t depth_of(int source) { return in_bytes(source) ? LINE : DEPTH; }
INLINE int64_t group_of(int source) { return in_bytes(source) ? SIDE / DIGITS : SIDE / 2; }

typedef struct {
    const char *w;            /* at the block's first output */
    const bf16 *const *each;  /* KEYS: from the first output on; COLUMNS: from the first input on */
    int64_t inputs, outputs;  /* outputs: that are left, of which a block has up to 64 */
    int64_t first;            /* COLUMNS: the first output's number in each input's weights */
} Block;

/* Have weights brought near: the processor's own guess does not see the next block. */
INLINE void ask_for(const void *ahead) { __builtin_prefetch(ahead, 0, 2); }

INLINE void put_lines(char *tile, const __m512i *line) {
    for (int r = 0; r < SIDE; r++) _mm512_store_si512(tile + r * LINE, line[r]);
}

/* Tiles of rows of x, for each group of rows one behind the other over the inputs. Row r of a
   group is the tile's row (where `turned`: its column) r in its upper half, r + 8 in its lower. */
INLINE void halves_of_rows(int source, const float *const *x, int64_t rows, int64_t inputs,
                           char *tile) {
    for (int64_t first = 0; first < rows; first += SIDE / 2)
        for (int64_t i = 0; i < inputs; i += DEPTH, tile += TILE) {
            __m512i line[SIDE];
            for (int r = 0; r < SIDE / 2; r++)
                if (first + r < rows)
                    split(x[first + r] + i, line + r, line + r + SIDE / 2);
                else
                    line[r] = line[r + SIDE / 2] = _mm512_setzero_si512();
            if (turned(source)) transpose(line);
            put_lines(tile, line);
        }
}

/* The power of two that makes a row's numbers whole ones of 20 bits, and its inverse: NaN where one
   is not finite. */
static float factor_of(const float *x, int64_t inputs, float *inverse) {
    int exponent = -100;
    float largest = largest_of(x, inputs);
    *inverse = 0;
    if (isnan(largest)) return NAN;
    if (largest > 0) frexpf(largest, &exponent);
    if (exponent < -100) exponent = -100;
    *inverse = ldexpf(1, 20 - exponent);
    return ldexpf(1, exponent - 20);
}

/* Digit by digit, 16 whole numbers of 20 bits. */
INLINE void digits_of(__m512i x, __m128i *digit) {
    __m512i half = _mm512_set1_epi32(64), mask = _mm512_set1_epi32(127);
    for (int d = DIGITS - 1; d > 0; d--) {
        __m512i last = _mm512_sub_epi32(_mm512_and_si512(_mm512_add_epi32(x, half), mask), half);
        digit[d] = _mm512_cvtepi32_epi8(last);
        x = _mm512_srai_epi32(_mm512_sub_epi32(x, last), 7);
    }
    digit[0] = _mm512_cvtepi32_epi8(x);
}

/* The same for weights in int8: digit d of a group's row r is column r + 5 d. */
INLINE void digits_of_rows(const float *const *x, int64_t rows, int64_t inputs, char *tile,
                           float *factors) {
    enum { GROUP = SIDE / DIGITS };
    float inverse[GROUP];
    for (int64_t first = 0; first < rows; first += GROUP) {
        for (int r = 0; r < GROUP && first + r < rows; r++)
            factors[first + r] = factor_of(x[first + r], inputs, inverse + r);
        for (int64_t i = 0; i < inputs; i += LINE, tile += TILE) {
            __m512i line[SIDE];
            for (int r = 0; r < SIDE; r++) line[r] = _mm512_setzero_si512();
            for (int r = 0; r < GROUP && first + r < rows; r++) {
                __m128i digit[LINE / SIDE][DIGITS];
                for (int part = 0; part < LINE / SIDE; part++) {
                    __m512 some = _mm512_loadu_ps(x[first + r] + i + part * SIDE);
                    some *= _mm512_set1_ps(inverse[r]);
                    digits_of(_mm512_cvtps_epi32(some), digit[part]);
                }
                for (int d = 0; d < DIGITS; d++) {
                    __m512i whole = _mm512_castsi128_si512(digit[0][d]);
                    whole = _mm512_inserti32x4(whole, digit[1][d], 1);
                    whole = _mm512_inserti32x4(whole, digit[2][d], 2);
                    line[r + GROUP * d] = _mm512_inserti32x4(whole, digit[3][d], 3);
                }
            }
            transpose(line);
            put_lines(tile, line);
        }
    }
}

/* Lines of two tiles, of two inputs' weights for 32 outputs: pairs of inputs side by side. Of eight
   outputs, the first tile has the first four: `put_tiles` knows. */
INLINE void pair_lines(const bf16 *even, const bf16 *odd, char *first, char *second) {
    __m512i x = _mm512_loadu_si512(even), y = _mm512_loadu_si512(odd);
    _mm512_store_si512(first, _mm512_unpacklo_epi16(x, y));
    _mm512_store_si512(second, _mm512_unpackhi_epi16(x, y));
}

INLINE __m512i line_of(int source, const Block *b, int64_t output, int64_t i) {
    if (output >= b->outputs) return _mm512_setzero_si512();
    if (source == KEYS) return _mm512_loadu_si512(b->each[output] + i);
    int64_t size = in_bytes(source) ? 1 : sizeof(bf16);
    return _mm512_loadu_si512(b->w + (output * b->inputs + i) * size);
}

/* Make a block's four tiles of the inputs from number i on; zeros stand for what is not there. */
INLINE void make_tiles(int source, const Block *b, int64_t i, char *tile) {
    static const bf16 zeros[DEPTH];
    if (source == COLUMNS) {
        for (int64_t o = 0; o < BLOCK && o < b->outputs; o += 2 * SIDE, tile += 2 * TILE)
            for (int64_t k = 0; k < DEPTH; k += 2) {
                const bf16 *even = i + k < b->inputs ? b->each[i + k] + b->first + o : zeros;
                const bf16 *odd = i + k + 1 < b->inputs ? b->each[i + k + 1] + b->first + o : zeros;
                pair_lines(even, odd, tile + k / 2 * LINE, tile + TILE + k / 2 * LINE);
                if (b->outputs > BLOCK) ask_for(even + BLOCK), ask_for(odd + BLOCK);
            }
        return;
    }
    for (int part = 0; part < BLOCK / SIDE; part++, tile += TILE) {
        __m512i line[SIDE];
        for (int r = 0; r < SIDE; r++) line[r] = line_of(source, b, part * SIDE + r, i);
        if (source == KEYS) transpose(line);
        put_lines(tile, line);
    }
}

/* Multiply one group of rows with a block's four tiles, or two with two of them, over all inputs.
   `made`: tiles that are there; null: they lie so, or are made here, beside the products of the
   step before. */
INLINE void multiply_tiles(int groups, int source, const Block *b, const char *made, int64_t part,
                           int first, int64_t steps, const char *x, float (*found)[SIDE * SIDE]) {
#define FOLLOW(INTO, X, W)               \
    if (in_bytes(source))                \
        _tile_dpbssd(INTO, W, X);        \
    else if (turned(source))             \
        _tile_dpbf16ps(INTO, W, X);      \
    else                                 \
        _tile_dpbf16ps(INTO, X, W)
    char own[2][BLOCK / SIDE * TILE] __attribute__((aligned(LINE)));
    const char *second = x + steps * TILE;
    int64_t size = in_bytes(source) ? 1 : sizeof(bf16);
    int64_t w_row = lying(source) ? b->inputs * size : LINE;
    int64_t w_part = SIDE * w_row;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; step++, x += TILE, second += TILE) {
        const char *w = made + step * BLOCK / SIDE * TILE;
        if (lying(source))
            w = b->w + step * LINE;
        else if (!made)
            make_tiles(source, b, step * depth_of(source), own[step % 2]), w = own[step % 2];
        if (lying(source) && first)
            for (int line = 0; line < BLOCK; line++)
                ask_for(b->w + BLOCK * w_row + (step * BLOCK + line) * LINE);
        w += part * w_part;
        _tile_loadd(4, x, LINE);
        _tile_loadd(6, w, w_row);
        FOLLOW(0, 4, 6);
        _tile_loadd(7, w + w_part, w_row);
        FOLLOW(1, 4, 7);
        if (groups == 2) {
            _tile_loadd(5, second, LINE);
            FOLLOW(2, 5, 6);
            FOLLOW(3, 5, 7);
        } else {
            _tile_loadd(5, w + 2 * w_part, w_row);
            FOLLOW(2, 4, 5);
            _tile_loadd(6, w + 3 * w_part, w_row);
            FOLLOW(3, 4, 6);
        }
    }
    _tile_stored(0, found[0], LINE);
    _tile_stored(1, found[1], LINE);
    _tile_stored(2, found[2], LINE);
    _tile_stored(3, found[3], LINE);
#undef FOLLOW
}

/* What a tile has found for a group's rows and 16 outputs. */
INLINE void add_parts(const float *found, int source, __m512 *sums) {
    enum { GROUP = SIDE / DIGITS };
    __m512i line[SIDE];
    for (int r = 0; r < SIDE; r++) line[r] = _mm512_load_si512(found + r * SIDE);
    if (turned(source)) transpose(line);
    if (in_bytes(source))
        for (int r = 0; r < GROUP; r++) {
            __m512 a = _mm512_cvtepi32_ps(line[r]), b = _mm512_cvtepi32_ps(line[r + GROUP]);
            __m512 c = _mm512_cvtepi32_ps(line[r + 2 * GROUP]);
            sums[r] = a * _mm512_set1_ps(16384) + (b * _mm512_set1_ps(128) + c);
        }
    else
        for (int r = 0; r < SIDE / 2; r++)
            sums[r] = (__m512)line[r] + (__m512)line[r + SIDE / 2];
}

/* Where products go: y (rows, outputs), times a factor of the output, of the row and of all. */
typedef struct {
    float *const *y;
    const float *scale, *factors;  /* null: 1 */
    float times;
    int add;                       /* to what is there */
} Target;

/* Write what two tiles have found for a group, from `row` on, and for up to `left` outputs from
   number o on. */
INLINE void put_tiles(const float *found, int source, const Target *t, int64_t row, int64_t rows,
                      int64_t o, int64_t left) {
    __m512 low[SIDE / 2], high[SIDE / 2];
    if (left <= 0) return;
    __mmask32 mask = left < 2 * SIDE ? (1u << left) - 1 : ~0u;
    __mmask16 first = (__mmask16)mask, second = (__mmask16)(mask >> SIDE);
    add_parts(found, source, low);
    add_parts(found + SIDE * SIDE, source, high);
    __m512 factor = _mm512_set1_ps(t->times), other = factor;
    if (t->scale) factor *= _mm512_maskz_loadu_ps(first, t->scale + o);
    if (t->scale) other *= _mm512_maskz_loadu_ps(second, t->scale + o + SIDE);
    __m512i lower = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
    for (int r = 0; r < group_of(source); r++) {
        if (row + r >= rows) return;
        __m512 x = source == COLUMNS ? _mm512_permutex2var_ps(low[r], lower, high[r]) : low[r];
        __m512 z = source == COLUMNS ? _mm512_permutex2var_ps(low[r], upper, high[r]) : high[r];
        float *y = t->y[row + r] + o;
        x *= factor, z *= other;
        if (t->factors) x *= _mm512_set1_ps(t->factors[row + r]);
        if (t->factors) z *= _mm512_set1_ps(t->factors[row + r]);
        if (t->add) x += _mm512_maskz_loadu_ps(first, y);
        if (t->add) z += _mm512_maskz_loadu_ps(second, y + SIDE);
        _mm512_mask_storeu_ps(y, first, x);
        _mm512_mask_storeu_ps(y + SIDE, second, z);
    }
}

/* Multiply rows, as tiles, with a block, whose first output has number o in y. */
INLINE void multiply_block(int source, const Block *b, const char *x, int64_t rows, char *room,
                           const Target *t, int64_t o) {
    float found[4][SIDE * SIDE] __attribute__((aligned(LINE)));
    int64_t group = group_of(source), depth = depth_of(source), row = 0;
    int64_t steps = (b->inputs + depth - 1) / depth;
    const char *made = rows > group ? room : 0;
    if (made && !lying(source))
        for (int64_t step = 0; step < steps; step++)
            make_tiles(source, b, step * depth, room + step * BLOCK / SIDE * TILE);
    for (; row + group < rows; row += 2 * group, x += 2 * steps * TILE)
        for (int part = 0; part < 4 && part * SIDE < b->outputs; part += 2) {
            multiply_tiles(2, source, b, made, part, !row && !part, steps, x, found);
            for (int i = 0; i < 2; i++)
                put_tiles(found[2 * i], source, t, row + group * i, rows, o + SIDE * part,
                          b->outputs - SIDE * part);
        }
    if (row < rows) {
        if (made)
            multiply_tiles(1, source, b, made, 0, !row, steps, x, found);
        else
            multiply_tiles(1, source, b, 0, 0, 1, steps, x, found);
        for (int i = 0; i < 2; i++)
            put_tiles(found[2 * i], source, t, row, rows, o + 2 * SIDE * i,
                      b->outputs - 2 * SIDE * i);
    }
}

/* Memory for tiles of rows and of a block, both over so many inputs; 0: there is none. */
static int tile_rooms(int source, int64_t rows, int64_t inputs, char **of_rows, char **of_weights) {
    int64_t steps = (inputs + depth_of(source) - 1) / depth_of(source), group = group_of(source);
    *of_rows = own_room(OF_ROWS, (rows + group - 1) / group * steps * TILE);
    *of_weights = own_room(OF_WEIGHTS, BLOCK / SIDE * steps * TILE);
    return *of_rows && *of_weights;
}

/* y[from:to] = x (rows, inputs) times w (outputs, inputs) transposed, in bf16 or int8. Returns 0
   where there is no memory. */
static int tile_product(const float *const *x, int64_t rows, const void *w, int64_t kind,
                        const float *scale, int64_t inputs, int64_t from, int64_t to,
                        float *const *y) {
    char *tiles, *room;
    float factors[rows];
    int in_int8 = kind == INT8;
    if (!tile_rooms(in_int8 ? BYTES : ROWS, rows, inputs, &tiles, &room)) return 0;
    Target t = {y, in_int8 ? scale : 0, in_int8 ? factors : 0, 1, 0};
    if (in_int8)
        digits_of_rows(x, rows, inputs, tiles, factors);
    else
        halves_of_rows(ROWS, x, rows, inputs, tiles);
    begin_tiles();
    for (int64_t o = from; o < to; o += BLOCK) {
        Block b = {.w = at(w, o * inputs, kind), .inputs = inputs, .outputs = to - o};
        if (in_int8 && to - o < BLOCK)
            multiply_block(FEWER_BYTES, &b, tiles, rows, room, &t, o);
        else if (in_int8)
            multiply_block(BYTES, &b, tiles, rows, room, &t, o);
        else if (to - o < BLOCK)
            multiply_block(FEWER_ROWS, &b, tiles, rows, room, &t, o);
        else
            multiply_block(ROWS, &b, tiles, rows, room, &t, o);
    }
    _tile_release();
    return 1;
}

/* y = or += x (rows, inputs, zeros to the next multiple of 32) times w, an address of `outputs`
   numbers in bf16 for each input; 0 where there is no memory. */
static int tile_columns(const float *const *x, int64_t rows, const bf16 *const *w, int64_t inputs,
                        int64_t outputs, int add, float *const *y) {
    char *tiles, *room;
    if (!tile_rooms(COLUMNS, rows, inputs, &tiles, &room)) return 0;
    Target t = {y, 0, 0, 1, add};
    halves_of_rows(COLUMNS, x, rows, inputs, tiles);
    begin_tiles();
    for (int64_t o = 0; o < outputs; o += BLOCK) {
        Block b = {.each = w, .inputs = inputs, .outputs = outputs - o, .first = o};
        multiply_block(COLUMNS, &b, tiles, rows, room, &t, o);
    }
    _tile_release();
    return 1;
}

/* Whether attention runs on tiles, which its widths decide alone. */
static int attends_on_tiles(int64_t kind, int64_t width, int64_t value) {
    return tiles_allowed && kind == BF16 && width % DEPTH == 0 && value % DEPTH == 0;
}

/* scores (queries, keys) = products of queries with keys, times `times`; 0 where there is no
   memory. */
static int tile_scores(const float *const *q, int64_t queries, const bf16 *const *k, int64_t keys,
                       int64_t width, float times, float *const *scores) {
    char *tiles, *room;
    if (!tile_rooms(KEYS, queries, width, &tiles, &room)) return 0;
    Target t = {scores, 0, 0, times, 0};
    halves_of_rows(KEYS, q, queries, width, tiles);
    begin_tiles();
    for (int64_t key = 0; key < keys; key += BLOCK) {
        Block b = {.each = k + key, .inputs = width, .outputs = keys - key};
        multiply_block(KEYS, &b, tiles, queries, room, &t, key);
    }
    _tile_release();
    return 1;
}

#else

int use_tiles(int wanted) { return wanted & 0; }

#endif
#endif
