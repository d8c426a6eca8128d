/* Products of rows in fp32 with weights in int8 where the processor adds up products of bytes
   (AVX512-VNNI), 64 at a time: in whole numbers, exactly.

   A row takes part as whole numbers of 16 bits, x = factor * (256 a + b) up to 2^-16 of the row's
   largest, with a and b its digits, in bytes. The processor wants one of two bytes without a sign:
   weights take part as w + 128, and 128 times the sum of the row's numbers is taken off again, all
   of it modulo 2^32, which what is wanted of up to 512 inputs fits. Whole numbers add up alike in
   any order: a row's bits are the same alone and among others, as everywhere here. A row that holds
   an infinity is NaN, as on tiles, and one whose largest is below 1e-38 is 0. */

#ifndef OPENMYTHOS_DIGITS
#define OPENMYTHOS_DIGITS

#include "rooms.h"
#include "vectors.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512VL__)
#define DIGIT_PRODUCTS

enum {
    TAKEN = 64,         /* inputs at a time: bytes of a register */
    WHOLE_SUM = 512,    /* inputs whose products 32 bits can hold: 128 * 32639 * 512 < 2^31 */
    LARGEST = 32639     /* whose digits fit: 127 * 256 + 127 */
};

static int digits_wanted = 1;

/* Do without digits, or with them again; returns whether they are used now. */
int use_digits(int wanted) { return digits_wanted = wanted; }

/* Whether a matrix is multiplied so, which its shape decides alone. */
static int in_digits(int64_t kind, int64_t inputs) {
    return digits_wanted && kind == INT8 && inputs % TAKEN == 0;
}

/* A row's digits, of each 64 inputs the upper ones and then the lower ones. */
typedef struct {
    const int8_t *digits;
    const int32_t *sums;  /* 128 times the sums of its numbers, over each 512 inputs */
    float factor;         /* NaN where one of its numbers is not finite */
} Digits;

/* What makes a row's numbers whole ones; sets what makes them themselves again. */
static float to_whole(const float *x, int64_t inputs, float *factor) {
    float largest = largest_of(x, inputs);
    *factor = NAN;
    if (isnan(largest)) return 0;
    if (largest < 1e-33f) largest = 1e-33f;
    *factor = largest / LARGEST;
    return LARGEST / largest;
}

static void digits_of_row(const float *x, int64_t inputs, int8_t *digits, int32_t *sums,
                          float *factor) {
    __m512 times = _mm512_set1_ps(to_whole(x, inputs, factor));
    __m512i total = _mm512_setzero_si512();
    for (int64_t i = 0; i < inputs; i += 16) {
        int8_t *into = digits + i / TAKEN * 2 * TAKEN + i % TAKEN;
        __m512i number = _mm512_cvtps_epi32(_mm512_loadu_ps(x + i) * times);
        __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(number, _mm512_set1_epi32(128)), 8);
        _mm_store_si128((__m128i *)into, _mm512_cvtepi32_epi8(upper));
        _mm_store_si128((__m128i *)(into + TAKEN), _mm512_cvtepi32_epi8(number));
        total = _mm512_add_epi32(total, number);
        if ((i + 16) % WHOLE_SUM && i + 16 < inputs) continue;
        *sums++ = (int32_t)(128u * (uint32_t)_mm512_reduce_add_epi32(total));
        total = _mm512_setzero_si512();
    }
}

/* The sums of four registers. */
INLINE __m128i four_sums(const __m512i *x) {
    __m512i first = _mm512_add_epi32(_mm512_unpacklo_epi32(x[0], x[1]),
                                     _mm512_unpackhi_epi32(x[0], x[1]));
    __m512i second = _mm512_add_epi32(_mm512_unpacklo_epi32(x[2], x[3]),
                                      _mm512_unpackhi_epi32(x[2], x[3]));
    __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(first, second),
                                   _mm512_unpackhi_epi64(first, second));
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all),
                                    _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

/* Products of some rows with four outputs' weights, added up over the inputs: times the factors of
   row and output they are the result. `ahead`: bytes to the weights that are asked for; 0: none. */
INLINE void digit_tile(int rows, const Digits *x, const int8_t *const *w, int64_t inputs,
                       int64_t ahead, __m128 *found) {
    const __m512i sign = _mm512_set1_epi8(-128);
    for (int r = 0; r < rows; r++) found[r] = _mm_setzero_ps();
    for (int64_t from = 0, part = 0; from < inputs; from += WHOLE_SUM, part++) {
        int64_t to = from + WHOLE_SUM < inputs ? from + WHOLE_SUM : inputs;
        __m512i upper[3][4], lower[3][4];
        for (int r = 0; r < rows; r++)
            for (int o = 0; o < 4; o++) upper[r][o] = lower[r][o] = _mm512_setzero_si512();
        for (int64_t i = from; i < to; i += TAKEN) {
            __m512i a[3], b[3];
            for (int r = 0; r < rows; r++) {
                a[r] = _mm512_load_si512(x[r].digits + 2 * i);
                b[r] = _mm512_load_si512(x[r].digits + 2 * i + TAKEN);
            }
            for (int o = 0; o < 4; o++) {
                __m512i weight = _mm512_xor_si512(_mm512_loadu_si512(w[o] + i), sign);
                if (ahead) __builtin_prefetch(w[o] + i + ahead);
                for (int r = 0; r < rows; r++) {
                    upper[r][o] = _mm512_dpbusd_epi32(upper[r][o], weight, a[r]);
                    lower[r][o] = _mm512_dpbusd_epi32(lower[r][o], weight, b[r]);
                }
            }
        }
        for (int r = 0; r < rows; r++) {
            __m512i both[4];
            for (int o = 0; o < 4; o++)
                both[o] = _mm512_add_epi32(_mm512_slli_epi32(upper[r][o], 8), lower[r][o]);
            __m128i sum = _mm_sub_epi32(four_sums(both), _mm_set1_epi32(x[r].sums[part]));
            found[r] += _mm_cvtepi32_ps(sum);
        }
    }
}

/* y[from:to] = x (rows, inputs) times w (outputs, inputs) transposed. Returns 0 where there is no
   memory. */
static int digit_product(const float *const *x, int64_t rows, const int8_t *w, const float *scale,
                         int64_t inputs, int64_t from, int64_t to, float *const *y) {
    int64_t parts = (inputs + WHOLE_SUM - 1) / WHOLE_SUM;
    int64_t bytes = rows * (2 * inputs + parts * (int64_t)sizeof(int32_t));
    int8_t *digits = (int8_t *)own_room(OF_DIGITS, bytes);
    if (!digits) return 0;
    int32_t *sums = (int32_t *)(digits + rows * 2 * inputs);
    Digits of[rows];
    for (int64_t r = 0; r < rows; r++) {
        of[r].digits = digits + r * 2 * inputs;
        of[r].sums = sums + r * parts;
        digits_of_row(x[r], inputs, digits + r * 2 * inputs, sums + r * parts, &of[r].factor);
    }
    for (int64_t o = from; o < to; o += 4) {
        int64_t left = to - o < 4 ? to - o : 4, r = 0;
        int64_t ahead = to - o >= 8 ? 4 * inputs : 0;
        __mmask8 some = (1 << left) - 1;
        __m128 scales = _mm_maskz_loadu_ps(some, scale + o);
        const int8_t *four[4];
        for (int i = 0; i < 4; i++) four[i] = w + (o + (i < left ? i : left - 1)) * inputs;
#define PRODUCT(N)                                                                            \
    do {                                                                                      \
        __m128 found[N];                                                                      \
        digit_tile(N, of + r, four, inputs, r ? 0 : ahead, found);                            \
        for (int i = 0; i < N; i++)                                                           \
            _mm_mask_storeu_ps(y[r + i] + o, some,                                            \
                               found[i] * _mm_set1_ps(of[r + i].factor) * scales);            \
    } while (0)
        for (; r + 2 <= rows; r += 2) PRODUCT(2);
        if (r < rows) PRODUCT(1);
#undef PRODUCT
    }
    return 1;
}

#else

int use_digits(int wanted) { return wanted & 0; }

#endif
#endif
